"""``fastdpo plan``: what memory a training will need, and what of it fits, before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig

from fastdpo.commands.arguments import ModelArguments, ScriptArguments
from fastdpo.commands.pairs import load_pairs
from fastdpo.commands.plan_flags import PlanArguments, PlanParser
from fastdpo.commands.plan_table import show, words_of
from fastdpo.commands.planned_command import command_for
from fastdpo.commands.preparation import say
from fastdpo.commands.trainer_from_flags import make_peft_config
from fastdpo.data.columns import any_may_have_images
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.adapters import is_adapter
from fastdpo.model.offloading import check_offloading
from fastdpo.model.packing_choice import obstacles_in
from fastdpo.plan.batches import Row, longest_rows, made_up_rows
from fastdpo.plan.devices import (
    RESERVED,
    RESERVED_ON_ACCELERATOR,
    check_kind,
    device_here,
    in_words,
    memory_of,
    parse_memory,
)
from fastdpo.plan.layout import has_own_aux_loss, layout_of
from fastdpo.plan.optimizers import check_optimizer
from fastdpo.plan.search import Answer, Batches, Planner, describe
from fastdpo.plan.setup import Setup
from fastdpo.plan.ways import ways_of
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import DatasetPreparer, is_tokenised
from fastdpo.trainer.models import hub_options_of
from fastdpo.trainer.optimizers import check_when_it_steps, optimizer_name


def run(argv: list[str]) -> int:
    """Run ``fastdpo plan``.

    Args:
        argv: the words after ``fastdpo plan``.

    Returns:
        0 where something fits, 1 where nothing does.

    Raises:
        UsageError: the flags, the data or the configuration cannot be used.
    """
    parser = PlanParser()
    script_args, model_args, training_args, _, plan_args = parser.read(argv)
    with bad_input():
        check_when_it_steps(optimizer_name(training_args))
        check_optimizer(optimizer_name(training_args))
    memory, usable, device = _memory(plan_args)
    stages = _stages(plan_args, training_args, device)
    setup = _setup(model_args, training_args, device, bf16_is_asked=parser.asked["bf16"][0] is not None)
    rows, of_what = _rows(script_args, model_args, training_args, plan_args, setup)
    with bad_input(f"--model_name_or_path {model_args.model_name_or_path}"):
        batches = _batches(training_args, setup, rows)
        planner = Planner(batches, usable)
    answers: list[Answer] = []
    for way in ways_of(setup, lambda: make_peft_config(replace(model_args, use_peft=True))):
        say(f"  {way.method}, {words_of(way)}")
        try:
            answers.append(planner.least_shared(way, stages, plan_args.device_count))
        except (NotImplementedError, ValueError) as error:
            if way == setup:
                raise UsageError(str(error)) from error
            say(f"    left out: {str(error).splitlines()[0]}")
    chosen = next((answer for answer in answers if answer.fits), None)
    command = None if chosen is None else command_for(chosen, setup, parser.asked, _plan_flags())
    if plan_args.json:
        told = {
            "model": model_args.model_name_or_path,
            "device": device,
            "memory": memory,
            "usable": usable,
            "layout": batches.layout,
            "pairs": of_what,
            "answers": [describe(answer) for answer in answers],
            "command": command,
        }
        print(json.dumps(told, indent=1))
    else:
        show(answers, chosen, command, f"{device}, {in_words(memory)}", of_what, batches.layout)
    return 0 if chosen is not None else 1


def _plan_flags() -> set[str]:
    return {f.name for f in fields(PlanArguments)}


def _memory(plan_args: PlanArguments) -> tuple[int, int, str]:
    """What the device has, what of it may be used, and its kind."""
    device = plan_args.device or device_here()
    with bad_input("--device"):
        check_kind(device)
    with bad_input("--memory"):
        memory = memory_of(device) if plan_args.memory is None else parse_memory(plan_args.memory)
    if memory is None:
        raise UsageError(f"--memory is needed: how much a {device} has cannot be seen on this machine.")
    with bad_input("--reserve"):
        reserved = RESERVED.get(device, RESERVED_ON_ACCELERATOR)
        reserved = reserved if plan_args.reserve is None else parse_memory(plan_args.reserve)
    if memory < 1:
        raise UsageError(f"--memory {plan_args.memory} is none; it should be like 24GiB, 80GB or 512MiB.")
    if reserved >= memory:
        kept, all_of_it = in_words(reserved), in_words(memory)
        raise UsageError(f"--reserve: {kept} are to be left free, of {all_of_it}; give a smaller one.")
    return memory, memory - reserved, device


def _setup(model_args: ModelArguments, args: DPOConfig, device: str, *, bf16_is_asked: bool) -> Setup:
    """The run that the flags describe."""
    name = model_args.model_name_or_path
    if not name:
        raise UsageError("--model_name_or_path is needed: a Hub model, or a folder with one.")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--model_name_or_path {name}: no such folder.")
    hub = {"revision": model_args.model_revision, **hub_options_of(args)}
    with bad_input(f"--model_name_or_path {name}"):
        if is_adapter(name, **hub):
            raise ValueError("this is an adapter; give the model that it was trained on, with --use_peft")
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **hub)
    # An accelerator computes in bfloat16 unless it is told otherwise, which this machine may not know of.
    bf16 = args.bf16 or (device != "cpu" and not args.fp16 and not bf16_is_asked)
    autocast = torch.bfloat16 if bf16 else torch.float16 if args.fp16 else None
    dtype = config.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype or "float32")
    peft_config = make_peft_config(model_args)
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None
    if bits and peft_config is None:
        raise UsageError(f"--load_in_{bits}bit needs --use_peft: weights in {bits} bits cannot be trained themselves.")
    return Setup(
        config,
        dtype=dtype or torch.float32,
        autocast=autocast,
        peft_config=peft_config,
        bits=bits,
        bits_compute=autocast or dtype or torch.float32,
        nested=model_args.use_bnb_nested_quant,
        checkpointing=bool(args.activation_checkpointing),
        checkpointing_kwargs=cast(dict[str, Any], args.gradient_checkpointing_kwargs or {}),
        offloading=args.activation_offloading,
        reference=_reference(args, peft_config),
        optim=optimizer_name(args),
        device=device,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def _reference(args: DPOConfig, peft_config: LoraConfig | None) -> str:
    if not args.loss_options.takes_reference:
        return "none"
    if args.precompute_ref_log_probs:
        return "cache"
    return "model" if peft_config is None else "adapter"


def _rows(
    script_args: ScriptArguments, model_args: ModelArguments, args: DPOConfig, plan_args: PlanArguments, setup: Setup
) -> tuple[list[Row], str]:
    """A batch of the rows that need most memory, and what they are, in words."""
    count = args.per_device_train_batch_size
    vocabulary = setup.config.get_text_config().vocab_size
    if plan_args.length is not None:
        prompt, answer = plan_args.lengths
        if args.max_length is not None and prompt + answer > args.max_length:
            raise UsageError(
                f"--length {plan_args.length}: {prompt + answer} tokens are above max_length, {args.max_length}, to "
                f"which a run cuts them. Give --max_length {prompt + answer}, or a shorter length."
            )
        return made_up_rows(prompt, answer, count, vocabulary), f"pairs of {prompt} + {answer} tokens"
    if not (script_args.names or script_args.datasets):
        raise UsageError("--dataset_name is needed, the pairs to train on; or --length, where there are none yet.")
    if script_args.is_streamed:
        raise UsageError(
            "a stream's lengths are not known beforehand; leave --dataset_streaming out, or give --length."
        )
    train, _ = load_pairs(script_args, evaluates=False, seed=args.seed, groups=args.keeps_groups)
    if any_may_have_images(train, None):
        raise UsageError("rows with images are not planned for: what a vision tower holds is not counted here.")
    with bad_input():
        name = model_args.model_name_or_path or ""
        preparer = DatasetPreparer(
            name, None, args, needs_tokenizer=not is_tokenised(train), images=False, vocab_size=vocabulary
        )
        prepared = preparer.prepare_to_train(train)
    assert isinstance(prepared, Dataset)
    rows = longest_rows(prepared, count, args.max_length)
    return rows, f"the {len(rows)} longest of {len(prepared):,} pairs"


def _batches(args: DPOConfig, setup: Setup, rows: list[Row]) -> Batches:
    obstacles = obstacles_in(
        has_own_collator=False,
        pad_to_multiple_of=args.pad_multiple,
        torch_compile=args.torch_compile,
        has_own_aux_loss=has_own_aux_loss(setup, args.router_aux_loss_coef),
        has_dropout=not args.disable_dropout,
    )
    return Batches(
        rows,
        layout_of(setup, args.packing, obstacles),
        args.max_tokens_per_batch,
        args.max_length,
        args.truncation_mode,
        args.pad_multiple,
        accumulates=args.gradient_accumulation_steps > 1,
        is_divisible=args.is_divisible,
    )


def _stages(plan_args: PlanArguments, args: DPOConfig, device: str) -> Sequence[str]:
    """The ways of sharing to try, that which sends least first."""
    if args.activation_offloading:
        with bad_input():
            is_sharded = plan_args.stage not in (None, "ddp")
            check_offloading(torch.device(device), is_sharded=is_sharded, compiles=args.torch_compile)
        return ("ddp",)
    if plan_args.device_count == 1:
        return ("ddp",)
    return ("ddp", "zero2", "fsdp2") if plan_args.stage is None else (plan_args.stage,)
