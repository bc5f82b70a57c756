"""Liger's kernels in the body, ours in the head: neither is lost."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb
from peft import LoraConfig, get_peft_model
from tiny_models import make_model

from fastdpo.model.head import FusedHead
from fastdpo.model.liger_kernels import HEAD, body_only, put_liger_kernels_in
from fastdpo.trainer.config import DPOConfig

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def modules_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger changes the modules of transformers, too."""
    for name in ("llama", "qwen2"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        for attribute in vars(module).copy():
            if attribute.endswith(("RMSNorm", "MLP")) or attribute == "apply_rotary_pos_emb":
                monkeypatch.setattr(module, attribute, getattr(module, attribute))


def kinds_of(model: Any) -> dict[str, set[Any]]:
    """The functions that norms and MLPs compute by."""
    layers = dict(model.named_modules())
    return {
        ending: {layer.forward.__func__ for name, layer in layers.items() if name.endswith(ending)}
        for ending in ("norm", "layernorm", "mlp")
    }


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("config", [None, {"rope": True}], ids=["default", "given"])
def test_the_body_is_ligers_and_the_head_is_not(config: dict[str, Any] | None, adapter: bool) -> None:
    model = make_model("llama")
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    inner = model.get_base_model() if adapter else model
    forward = type(inner).forward
    put_liger_kernels_in(model, config, CUDA)
    expected = {"norm": {LigerRMSNorm.forward}, "layernorm": {LigerRMSNorm.forward}, "mlp": {LigerSwiGLUMLP.forward}}
    assert kinds_of(inner) == expected
    module = importlib.import_module(type(inner).__module__)
    assert module.apply_rotary_pos_emb is liger_rotary_pos_emb
    # Liger's own way with the head: a forward of the whole model's.
    assert "forward" not in vars(inner) and type(inner).forward is forward
    head = FusedHead(model)
    assert all("forward" not in vars(layer) for layer in head._heads)  # ours stands there during its calls alone


def test_liger_itself_would_take_the_head() -> None:
    """What the settings keep it from."""
    from transformers.integrations.liger import apply_liger_kernel

    model = make_model("llama")
    apply_liger_kernel(model, None)
    assert isinstance(vars(model)["forward"], MethodType)


def test_a_kernel_can_be_left_out() -> None:
    model = make_model("llama")
    before = kinds_of(model)["mlp"]
    put_liger_kernels_in(model, {"swiglu": False}, CUDA)
    assert kinds_of(model)["mlp"] == before and kinds_of(model)["norm"] == {LigerRMSNorm.forward}


def test_trainer_is_told_so_as_well(tmp_path: Path) -> None:
    """It puts the kernels in once more, when the training begins."""
    args = DPOConfig(str(tmp_path), use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert args.liger_kernel_config == {"rope": False, **dict.fromkeys(HEAD, False)}
    assert DPOConfig(str(tmp_path)).liger_kernel_config is None


@pytest.mark.parametrize(
    ("config", "device", "error", "message"),
    [
        ({"fused_linear_cross_entropy": True}, CUDA, ValueError, "fused_linear_cross_entropy on, but the head"),
        ({"cross_entropy": True}, CUDA, ValueError, "cross_entropy on, but the head"),
        ({"ropes": True}, CUDA, ValueError, "names ropes, which Liger does not have .* it has rope, rms_norm, swiglu"),
        (None, torch.device("cpu"), NotImplementedError, "do not run on a CPU"),
    ],
)
def test_what_cannot_be(config: Any, device: torch.device, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        put_liger_kernels_in(make_model("llama"), config, device)


def test_a_model_without_kernels_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Liger has no kernels for GPT2LMHeadModel"):
        put_liger_kernels_in(make_model("gpt2"), None, CUDA)


def test_liger_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpo.model.liger_kernels.is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        put_liger_kernels_in(make_model("llama"), None, CUDA)


def test_body_only_keeps_what_it_was_given() -> None:
    given = {"swiglu": False}
    assert body_only(given) == {"swiglu": False, **dict.fromkeys(HEAD, False)} and given == {"swiglu": False}


# Triton's own interpreter runs its kernels on the CPU, one program after another.
RUN = """
import json, sys
from pathlib import Path

import numpy as np
import triton.language as tl
from datasets import Dataset
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter
from toy_data import make_tokenizer, text_rows
from tiny_models import make_model
from trainer_runs import config
from fastdpo.trainer import DPOTrainer
from fastdpo.model.head import FusedHead

# A number that a compiled kernel is given is Triton's scalar; the interpreter leaves it Python's, which has no .to().
convert = interpreter._implicit_cvt
def with_floats(arg):
    if isinstance(arg, float):
        return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
    return convert(arg)
interpreter._implicit_cvt = with_floats
rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # CUDA's own function, of which the interpreter knows nothing

calls = {"head": 0, "norm": 0}
score = FusedHead._score_columns
def counted(self, *args, **kwargs):
    calls["head"] += 1
    return score(self, *args, **kwargs)
FusedHead._score_columns = counted
liger = sys.argv[2] == "liger"
args = config(Path(sys.argv[1]), use_liger_kernel=liger, max_length=24, bf16=False, packing=sys.argv[3])
rows = Dataset.from_list(text_rows(4))
trainer = DPOTrainer(model=make_model("llama"), args=args, processing_class=make_tokenizer(), train_dataset=rows)
if liger:
    forward = rms_norm.rms_norm_forward
    def seen(*given, **kwargs):
        calls["norm"] += 1
        return forward(*given, **kwargs)
    rms_norm.rms_norm_forward = seen
trainer.train()
assert "forward" not in vars(trainer.model)
print(json.dumps({"calls": calls, "log": [entry for entry in trainer.state.log_history if "loss" in entry]}))
"""


def run(folder: Path, *words: str) -> dict[str, Any]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), *words], capture_output=True, text=True, timeout=600, env=env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_a_training_has_both(packing: str, tmp_path: Path) -> None:
    liger, plain = (run(tmp_path / name, name, packing) for name in ("liger", "plain"))
    assert liger["calls"]["norm"] > 0 and liger["calls"]["head"] > 0
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        expected = [entry[name] for entry in plain["log"]]
        assert [entry[name] for entry in liger["log"]] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
