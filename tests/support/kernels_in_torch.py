"""The kernels of causal-conv1d, mamba-ssm and flash-linear-attention, as far as they keep sequences apart, in torch.

Each takes a packed row sequence by sequence, with what transformers has in torch for one sequence; and each has its
package's arguments, because transformers passes on no others. So a tiny model runs here as it does where the packages
are, in any dtype.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.hub_kernels import (
    _KERNELS_INTERNAL_PATH_MAPPINGS,
    use_kernel_func_from_hub_with_fallback,
)

Kernel = Callable[..., Any]


def install_kernels(
    patch: pytest.MonkeyPatch, model: PreTrainedModel, *, leaking: str | None = None, in_16_bits: bool = False
) -> list[str]:
    """Puts kernels in the place of what ``model`` has in torch, as if their packages were installed.

    Args:
        patch: undoes it.
        model: whose code it is.
        leaking: the name of a kernel that is to ignore where sequences begin; ``gradient of`` before it for one that
            does so in its backward alone.
        in_16_bits: kernels of linear attention take bfloat16 and float16 alone, as flash-linear-attention's do.

    Returns:
        The packages, as they are imported.
    """
    found: dict[str, list[tuple[ModuleType, str, str, Kernel]]] = {}
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        for attribute, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and value.__closure__:
                kept = inspect.getclosurevars(value).nonlocals
                if {"func_name", "package", "torch_function"} <= kept.keys():
                    entry = (module, attribute, kept["package"], kept["torch_function"])
                    found.setdefault(kept["func_name"], []).append(entry)
    for name, places in found.items():
        for module, attribute, package, in_torch in places:
            if name not in _KERNELS:
                continue
            conv = found["causal_conv1d_fn"][0][3]
            scan = found.get("mamba_chunk_scan_combined", [(None, "", "", None)])[0][3]
            kernel = _KERNELS[name](in_torch, conv, scan)
            if leaking == name:
                kernel = _without_bounds(kernel)
            elif leaking == f"gradient of {name}":
                kernel = _without_bounds_backwards(kernel)
            if in_16_bits and package == "fla":
                kernel = _in_16_bits_alone(kernel)
            with pytest.MonkeyPatch.context() as packages:
                for path, part in _package(package, name, kernel).items():
                    packages.setitem(sys.modules, path, part)
                wrapped = use_kernel_func_from_hub_with_fallback(name, package)(in_torch)
            patch.setattr(module, attribute, wrapped)
    return sorted({package for places in found.values() for _, _, package, _ in places})


def _package(package: str, name: str, kernel: Kernel) -> dict[str, ModuleType]:
    """Modules by path, in the last of which the kernel is, where transformers looks for it."""
    parts = [package, *_KERNELS_INTERNAL_PATH_MAPPINGS.get(name, "").split(".")]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts)) if parts[i]]
    modules = {path: ModuleType(path) for path in paths}
    for outer, inner in zip(paths, paths[1:], strict=False):
        setattr(modules[outer], inner.rsplit(".", 1)[1], modules[inner])
    setattr(modules[paths[-1]], name, kernel)
    return modules


def _without_bounds(kernel: Kernel) -> Kernel:
    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **{**kwargs, **dict.fromkeys(kwargs.keys() & {"seq_idx", "cu_seqlens"})})

    call.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return call


def _without_bounds_backwards(kernel: Kernel) -> Kernel:
    leaking = _without_bounds(kernel)

    def call(*args: Any, **kwargs: Any) -> Any:
        right, wrong = kernel(*args, **kwargs), leaking(*args, **kwargs)
        if isinstance(right, Tensor):
            return wrong + (right - wrong).detach()
        return (wrong[0] + (right[0] - wrong[0]).detach(), *right[1:])

    call.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return call


def _in_16_bits_alone(kernel: Kernel) -> Kernel:
    def call(*args: Any, **kwargs: Any) -> Any:
        assert args[0].dtype in (torch.bfloat16, torch.float16), "takes 16 bits alone"
        return kernel(*args, **kwargs)

    call.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return call


def _sequences(seq_idx: Tensor | None, cu_seqlens: Tensor | None, length: int) -> Iterator[slice]:
    """Where the sequences are; without a word on it there is one."""
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (1, length)
        sizes = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
    elif cu_seqlens is not None:
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == length
        sizes = cu_seqlens.diff().tolist()
    else:
        sizes = [length]
    begin = 0
    for size in sizes:
        yield slice(begin, begin + size)
        begin += size


def _causal_conv1d_fn(in_torch: Kernel, conv: Kernel, scan: Kernel) -> Kernel:
    def causal_conv1d_fn(
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        assert initial_states is None and not return_final_states
        parts = _sequences(seq_idx, None, x.shape[2])
        return torch.cat([in_torch(x[:, :, part], weight, bias, activation=activation) for part in parts], dim=2)

    return causal_conv1d_fn


def _mamba_chunk_scan_combined(in_torch: Kernel, conv: Kernel, scan: Kernel) -> Kernel:
    def mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        seq_idx=None,
        cu_seqlens=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        return_varlen_states=False,
    ):
        assert z is None and initial_states is None and not return_final_states
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        parts = _sequences(seq_idx, None, x.shape[1])
        return torch.cat(
            [in_torch(x[:, p], dt[:, p], A, B[:, p], C[:, p], chunk_size, **options) for p in parts], dim=1
        )

    return mamba_chunk_scan_combined


def _mamba_split_conv1d_scan_combined(in_torch: Kernel, conv: Kernel, scan: Kernel) -> Kernel:
    """Projections in one tensor to a layer's output: what transformers does in torch in several steps."""
    of_conv = _causal_conv1d_fn(conv, conv, scan)
    of_scan = _mamba_chunk_scan_combined(scan, conv, scan)

    def mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        initial_states=None,
        seq_idx=None,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        activation="silu",
        rmsnorm_weight=None,
        rmsnorm_eps=1e-6,
        outproj_weight=None,
        outproj_bias=None,
        headdim=None,
        ngroups=1,
        norm_before_gate=True,
    ):
        assert initial_states is None and not return_final_states and not norm_before_gate
        heads = A.shape[0]
        dim = heads * headdim
        z, xbc, dt = zxbcdt.split([dim, conv1d_weight.shape[0], heads], dim=-1)
        xbc = of_conv(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation).transpose(1, 2)
        states = (conv1d_weight.shape[0] - dim) // 2
        x, b, c = xbc.split([dim, states, states], dim=-1)
        x, b, c = x.unflatten(-1, (heads, headdim)), b.unflatten(-1, (ngroups, -1)), c.unflatten(-1, (ngroups, -1))
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit, "seq_idx": seq_idx}
        y = of_scan(x, dt, A, b, c, chunk_size, **options).flatten(2)
        y = y.to(z.dtype) * F.silu(z)
        if rmsnorm_weight is not None:
            # In groups, each with a norm of its own.
            groups = y.unflatten(-1, (ngroups, -1))
            norms = (groups.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()
            y = (groups * norms).flatten(-2) * rmsnorm_weight
        return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)

    return mamba_split_conv1d_scan_combined


def _delta_rule(name: str) -> Callable[[Kernel, Kernel, Kernel], Kernel]:
    def make(in_torch: Kernel, conv: Kernel, scan: Kernel) -> Kernel:
        def delta_rule(
            q,
            k,
            v,
            g,
            beta,
            scale=None,
            initial_state=None,
            output_final_state=False,
            use_qk_l2norm_in_kernel=False,
            cu_seqlens=None,
        ):
            assert scale is None and initial_state is None and not output_final_state
            parts = [
                in_torch(*(x[:, part] for x in (q, k, v)), g=g[:, part], beta=beta[:, part], **options)[0]
                for options in ({"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel},)
                for part in _sequences(None, cu_seqlens, q.shape[1])
            ]
            return torch.cat(parts, dim=1), None

        delta_rule.__name__ = name
        return delta_rule

    return make


def _selective_scan_fn(in_torch: Kernel, conv: Kernel, scan: Kernel) -> Kernel:
    """mamba-ssm's has no argument that says where sequences begin."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        return in_torch(
            u,
            delta,
            A,
            B,
            C,
            D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            return_last_state=return_last_state,
        )

    return selective_scan_fn


_KERNELS: dict[str, Callable[[Kernel, Kernel, Kernel], Kernel]] = {
    "causal_conv1d_fn": _causal_conv1d_fn,
    "mamba_chunk_scan_combined": _mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": _mamba_split_conv1d_scan_combined,
    "chunk_gated_delta_rule": _delta_rule("chunk_gated_delta_rule"),
    "chunk_kda": _delta_rule("chunk_kda"),
    "selective_scan_fn": _selective_scan_fn,
}
