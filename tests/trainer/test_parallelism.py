"""What a run with tensor or context parallelism loads, counts and refuses; that it trains is in test_matrix.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from tiny_models import make_model
from transformers.distributed import DistributedConfig

from fastdpo.data.share import DataShare
from fastdpo.model.cut_heads import HeadCutAttention
from fastdpo.model.cut_rows import CutAttention
from fastdpo.model.packing_choice import Packing
from fastdpo.trainer import DPOConfig, parallelism
from fastdpo.trainer.parallelism import (
    attention_of,
    check_parallelism,
    config_of,
    data_ranks,
    gathered_once,
    keep_attention,
    loading_kwargs,
    settle_sequences,
)

TP = {"tp": 2, "dp": 1, "pp": 1, "ep": 1}


def args_of(folder: Path, config: ParallelismConfig | None = None, **options: Any) -> DPOConfig:
    return DPOConfig(str(folder), use_cpu=True, parallelism_config=config, **options)


def accelerator_of(rank: int, ranks: int, **sizes: int) -> Any:
    config = ParallelismConfig(**sizes) if sizes else None
    return SimpleNamespace(parallelism_config=config, process_index=rank, num_processes=ranks)


def cut_as(monkeypatch: pytest.MonkeyPatch, *sizes: dict[str, int]) -> list[Any]:
    """Models that pass for such that are cut so."""
    models = [SimpleNamespace(sizes=of_one) for of_one in sizes]
    monkeypatch.setattr(parallelism, "sizes_of", lambda model: model.sizes)
    return models


def test_processes_that_hold_parts_of_a_model_or_of_sequences_share_data() -> None:
    assert DataShare.of(accelerator_of(3, 4)) == DataShare(3, 4)
    assert [DataShare.of(accelerator_of(rank, 2, tp_size=2)) for rank in range(2)] == [
        DataShare(0, 1, 2, is_first=True),
        DataShare(0, 1, 2, is_first=False),
    ]
    places = [DataShare.of(accelerator_of(rank, 4, cp_size=2, dp_shard_size=2)) for rank in range(4)]
    assert [(place.index, place.count, place.is_first) for place in places] == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
    ]


def test_rows_of_an_evaluation_count_once() -> None:
    # Two shares of two rows, each on two processes; the last batch has three rows, and one that is repeated.
    everyones = torch.tensor([[0.0], [1.0], [0.0], [1.0], [2.0], [0.0], [2.0], [0.0]])
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    accelerator = accelerator_of(0, 4, tp_size=2, dp_shard_size=2)
    accelerator.gather, accelerator.gradient_state = lambda _: everyones, state
    assert gathered_once(accelerator, everyones[:2]).flatten().tolist() == [0.0, 1.0, 2.0]
    state.end_of_dataloader = False
    assert gathered_once(accelerator, everyones[:2]).flatten().tolist() == [0.0, 1.0, 2.0, 0.0]


def test_a_model_by_name_is_cut_as_the_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_of(tmp_path, ParallelismConfig(tp_size=2, dp_shard_size=3))
    expected = DistributedConfig(tp_size=2, tp_plan="auto", fsdp_size=3)
    assert loading_kwargs(args) == {"distributed_config": expected}
    assert loading_kwargs(args_of(tmp_path, args.parallelism_config, model_init_kwargs={"tp_plan": "auto"})) == {}
    assert loading_kwargs(args_of(tmp_path)) == {}
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "4")
    assert config_of(args_of(tmp_path)).tp_size == 4
    assert loading_kwargs(args_of(tmp_path))["distributed_config"].tp_size == 4


def test_pairs_a_step_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = cut_as(monkeypatch, TP)
    monkeypatch.setattr(DPOConfig, "world_size", 8)
    assert data_ranks(args_of(tmp_path)) == 8
    assert data_ranks(args_of(tmp_path), model) == 4
    assert data_ranks(args_of(tmp_path, ParallelismConfig(cp_size=4, dp_shard_size=2))) == 2


@pytest.mark.parametrize(
    ("sizes", "config", "options", "error", "words"),
    [
        ({}, {"sp_size": 2}, {}, ValueError, r"sp_size=2.*with FSDP2 alone: start the run with it"),
        ({}, {"tp_size": 2}, {}, ValueError, r"tp_size is 2.*and the model is whole: give the model's name"),
        ({}, {"cp_size": 2}, {}, ValueError, r"cp_size=2.*with FSDP2 alone: start the run with it"),
        (TP, {"cp_size": 2}, {}, NotImplementedError, r"not supported with cp_size; use one of them"),
        (TP, {"sp_size": 2}, {}, NotImplementedError, r"not supported with sp_size; use one of them"),
        (TP, {"tp_size": 4}, {}, ValueError, r"tp_size is 4.*and the model has 2"),
        (TP, {}, {"sync_ref_model": True}, NotImplementedError, r"sync_ref_model.*leave it out"),
        (TP, {}, {"torch_compile": True}, NotImplementedError, r"torch_compile.*leave it out"),
        (TP | {"pp": 2}, {}, {}, NotImplementedError, r"pipeline parallelism; use tp_size and fsdp_size"),
    ],
)
def test_what_a_run_cannot_have_is_refused(
    sizes: dict[str, int],
    config: dict[str, int],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (model,) = cut_as(monkeypatch, sizes)
    args = args_of(tmp_path, ParallelismConfig(**config) if config else None)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(error, match=words):
        check_parallelism(model, None, args)


def test_both_models_are_cut_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut, more = cut_as(monkeypatch, {}, TP, TP | {"tp": 4})
    args = args_of(tmp_path)
    for policy, reference in ((whole, cut), (cut, whole), (cut, more)):
        with pytest.raises(ValueError, match="not cut over processes alike: load both with the same DistributedConfig"):
            check_parallelism(policy, reference, args)
    check_parallelism(cut, cut, args)
    check_parallelism(whole, whole, args)


def test_accelerates_engines_would_cut_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = cut_as(monkeypatch, TP)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match=r"accelerate's FSDP.*give fsdp_size beside tp_size"):
        check_parallelism(model, None, args_of(tmp_path))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.1}, "load-balancing loss.*of its own.*give router_aux_loss_coef 0"),
        ("llama", {"torch_compile": True}, "torch_compile is not supported with cp_size=2"),
    ],
)
def test_what_cut_sequences_cannot_have_is_refused(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallelism, "calls_known_function", lambda lm: False)  # Mixtral's is one that is known
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = args_of(tmp_path, ParallelismConfig(cp_size=2))
    check_parallelism(make_model("llama"), None, args)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(NotImplementedError, match=words):
        check_parallelism(make_model(kind), None, args)


@pytest.mark.parametrize(("sizes", "config"), [(TP, {}), ({}, {"tp_size": 2}), ({}, {"cp_size": 2})])
def test_processes_of_a_cpu_have_no_meshes(
    sizes: dict[str, int], config: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = cut_as(monkeypatch, sizes)
    args = args_of(tmp_path, ParallelismConfig(**config) if config else None)
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(NotImplementedError, match=r"no device meshes; start the run on GPUs"):
        check_parallelism(model, None, args)


def test_sp_size_is_what_accelerate_has_for_cp_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_of(tmp_path)
    settle_sequences(args)
    assert args.parallelism_config is None
    args.parallelism_config = whole = ParallelismConfig(cp_size=2)
    settle_sequences(args)
    assert args.parallelism_config is whole
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "3")
    monkeypatch.setattr(DPOConfig, "world_size", 6)
    for told in (None, ParallelismConfig()):  # by accelerate launch, and by hand
        args.parallelism_config = told
        assert data_ranks(args) == 3
        settle_sequences(args)
        made = args.parallelism_config
        assert (made.dp_shard_size, made.cp_size, made.sp_size) == (3, 2, 1)
        model = make_model("llama")
        for config, kind in ((made, HeadCutAttention), (ParallelismConfig(cp_size=2, sp_size=1), CutAttention)):
            accelerator = accelerator_of(0, 6)
            accelerator.parallelism_config = config
            accelerator.torch_device_mesh = {"cp": SimpleNamespace(get_group=object)}
            assert isinstance(attention_of(model, Packing("padded"), accelerator), kind)
    handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="flash_attention_2")
    args.parallelism_config = ParallelismConfig(sp_size=2, sp_handler=handler)
    with pytest.raises(NotImplementedError, match="sp_attn_implementation is flash_attention_2.*--attn_impl"):
        settle_sequences(args)


def test_accelerate_leaves_sliding_windows_to_cut_rows() -> None:
    assert hasattr(Accelerator, "_prepare_cp")  # what would take the masks from every attention, or refuse
    accelerator = accelerator_of(0, 2, cp_size=2)
    accelerator.torch_device_mesh = {"cp": SimpleNamespace(get_group=lambda: None)}
    keep_attention(accelerator)
    assert not hasattr(accelerator, "_prepare_cp")  # no ranks that rows are cut over
    accelerator.torch_device_mesh = {"cp": SimpleNamespace(get_group=object)}
    keep_attention(accelerator)
    model = make_model("gemma2", sliding_window=5)
    assert accelerator._prepare_cp(model, None) == (model, None)
    assert not any(module._forward_pre_hooks for module in model.modules())
