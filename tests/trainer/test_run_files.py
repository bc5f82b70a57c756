"""Every field of TRL's and transformers' arguments is used here, or refused by name; none is accepted and ignored."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
import yaml
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

import fastdpo
from fastdpo.commands.arguments import ModelArguments, ScriptArguments
from fastdpo.commands.flags import TrainParser
from fastdpo.data.mixture import Part
from fastdpo.errors import UsageError
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.loss_arguments import LossArguments
from fastdpo.trainer.row_arguments import RowArguments
from fastdpo.trainer.run_files import INSTEAD, TAKEN

# What TRL's DPOConfig has of transformers.TrainingArguments, that its Trainer (or accelerate, through it) does here as
# it does there. Whoever adds a name has seen that it is so.
INHERITED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
    max_grad_norm label_smoothing_factor fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_first_step log_on_each_node
    log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_use_gather_object eval_accumulation_steps save_only_model save_strategy save_steps
    save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint
"""
BEFORE = {each.name for each in fields(transformers.TrainingArguments)}
DECLARED = {name for kind in (DPOConfig, RowArguments, LossArguments) for name in vars(kind)["__annotations__"]}


def classes_of(name: str) -> list[str]:
    """In which classes a field of TRL's DPOConfig is; one, if all is well."""
    declared = name in DECLARED
    classes = {
        "declared": declared and name not in TAKEN,
        "inherited": name in INHERITED.split() and not declared,
        "one value": name in TAKEN,
        "refused": name in INSTEAD,
    }
    return [label for label, is_in in classes.items() if is_in]


def test_every_field_of_trls_config_is_in_one_class() -> None:
    found = {each.name: classes_of(each.name) for each in fields(trl.DPOConfig)}
    assert not {name: classes for name, classes in found.items() if len(classes) != 1}
    ours = {each.name for each in fields(DPOConfig)}
    for name, (kind,) in found.items():
        assert (name in ours) == (kind != "refused"), name


def test_no_field_of_transformers_is_unlooked_at() -> None:
    assert not {name: classes_of(name) for name in BEFORE if len(classes_of(name)) != 1}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (trl.ScriptArguments, ScriptArguments),
        (DatasetMixtureConfig, ScriptArguments),
        (trl.ModelConfig, ModelArguments),
        (DatasetConfig, Part),
    ],
)
def test_every_field_of_trls_other_arguments_is_ours(theirs: type, ours: type) -> None:
    names = {each.name for each in fields(ours)}
    assert not {each.name for each in fields(theirs)} - names
    assert not names & INSTEAD.keys()


def sources(folder: Path, *patterns: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for pattern in patterns for path in sorted(folder.glob(pattern)))


def test_every_field_is_read_somewhere() -> None:
    """By more than its declaration: what nobody reads is accepted and ignored."""
    room = Path(fastdpo.__file__).parent
    arguments = room / "commands" / "arguments.py"
    declarations = {arguments, room / "commands" / "flags.py", room / "data" / "mixture.py"}
    declarations |= {room / "trainer" / name for name in ("run_files.py", "resume_settings.py", "memory_advice.py")}
    here = "\n".join(path.read_text(encoding="utf-8") for path in room.rglob("*.py") if path not in declarations)
    there = sources(
        Path(transformers.__file__).parent,
        *("trainer*.py", "training_args.py", "integrations/*.py", "optimization.py", "utils/generic.py"),
    )
    # An attribute of something, an argument, or a name in quotes.
    read_here = set(re.findall(r"(?:(?<=\.)|(?<=\"))[a-z]\w+(?=\W)|(?<=[ (])[a-z]\w+(?==\S)", here))
    read_here |= set(re.findall(r"(?<=\bself\.)\w+", arguments.read_text(encoding="utf-8")))
    read_there = set(re.findall(r"(?<=\bargs\.)\w+|(?<=\bself\.)\w+|(?<=\bstate\.)\w+", there))
    ours = {each.name for kind in (DPOConfig, ScriptArguments, ModelArguments) for each in fields(kind)}
    assert "no_such_field" not in read_here and "beta" in read_here and "save_steps" in read_there
    inherited = BEFORE - DECLARED
    unread = {name for name in ours if name not in (read_there | read_here if name in inherited else read_here)}
    assert not unread - TAKEN.keys()


def wrong(name: str) -> Any:
    """A value that is not taken, and not the argument's type either where that does not matter."""
    return {True: False, False: True}.get(TAKEN[name][0][0], "other") if TAKEN[name][0][0] != [] else ["loss"]


@pytest.mark.parametrize("name", TAKEN)
def test_a_value_without_effect_is_refused(name: str, tmp_path: Path) -> None:
    taken, why = TAKEN[name]
    with pytest.raises(ValueError, match=f"^{name} is ") as caught:
        DPOConfig(str(tmp_path), **{name: wrong(name)})
    assert str(caught.value).endswith(why)
    for value in taken:
        assert getattr(DPOConfig(str(tmp_path), **{name: value}), name) == value


def test_names_of_others_are_refused_with_what_to_use(tmp_path: Path) -> None:
    parser = TrainParser()
    everything = {each.name for kind in (DPOConfig, ScriptArguments, ModelArguments) for each in fields(kind)}
    assert not everything & INSTEAD.keys()
    for name, instead in INSTEAD.items():
        with pytest.raises(TypeError) as caught:
            DPOConfig(str(tmp_path), **{name: 1})
        assert str(caught.value) == f"{name}: {instead}"
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            with pytest.raises(UsageError) as refused:
                parser.read([flag, "1"])
            assert f"{flag}: {instead}" in str(refused.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rpo_alhpa'"):
        DPOConfig(str(tmp_path), rpo_alhpa=1)


def test_a_file_is_told_of_all_of_them_at_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.dump(dict.fromkeys(INSTEAD, 1)), encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        TrainParser().read(["--config", str(tmp_path / "run.yaml")])
    for name, instead in INSTEAD.items():
        assert f"\n  {name}: {instead}" in str(refused.value)


def test_what_is_advised_exists() -> None:
    # Keys in others, columns, values, environment variables: what has an underscore and is no flag.
    others = {"use_reentrant", "all_reduce", "compute_metrics"}
    others |= {"ref_chosen_logps", "ref_rejected_logps", "flash_attention_2", "before_and_after", "tpu_metrics_debug"}
    others |= {"dispatch_batches", "split_batches", "tokens_per_second", "group_by_length", "ref_model"}
    known = {action.dest for action in TrainParser()._actions} | others
    said = {word for text in INSTEAD.values() for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", text)}
    said |= {word for _, text in TAKEN.values() for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", text)}
    assert said - known == set()


def default_of(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def test_a_file_of_all_of_trls_defaults_is_read(tmp_path: Path) -> None:
    """As a record of a run's settings has them; but for the one that would hide what we stop at."""
    defaults = {
        each.name: default_of(each)
        for kind in (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments)
        for each in fields(kind)
        if each.name not in INSTEAD
    }
    assert defaults.pop("logging_nan_inf_filter") is True
    values = {name: getattr(value, "value", value) for name, value in defaults.items()} | {"use_cpu": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    script, model, args, _ = TrainParser().read(["--config", str(tmp_path / "run.yaml")])
    # What is otherwise once the object is made, as in TRL's, or on purpose.
    settled = {"pad_to_multiple_of", "include_num_input_tokens_seen", "dataloader_pin_memory", "report_to", "debug"}
    for name, value in values.items():
        ours = next(getattr(each, name) for each in (script, model, args) if hasattr(each, name))
        assert ours == value or None in (ours, value) or name in settled, name
