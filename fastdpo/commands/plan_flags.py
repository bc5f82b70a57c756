"""The flags of ``fastdpo plan``: those of ``fastdpo train``, and for what machine."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from fastdpo.commands.arguments import ModelArguments
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.launch_flags import LaunchFlags
from fastdpo.commands.planned_launch import settle_devices
from fastdpo.plan.sharding import STAGES

EPILOG = """\
Nothing is downloaded but the model's configuration (and, with --dataset_name, its tokenizer), no weights are loaded,
and nothing is computed: a training step runs on tensors that have shapes and no numbers, and what it would hold is
counted as it comes and goes. The step is the run's own: its model, attention, head, autograd and checkpointing.

The table has a row for each way to train, with the largest micro-batch that fits. Batches are taken to be the longest
rows of the data; where they do not fit as they are, --max_tokens_per_batch says in which parts they are to be taken,
which changes nothing but time. The command below it is the first way that fits, the nearest to what the flags ask for.

docs/guides/plan.md says how far estimates are from measured peaks on a CPU. On any other device they were not measured;
1 GiB is left for the driver there, unless --reserve says otherwise.

examples:
  what fits on a GPU of 24 GiB, for a file of pairs:
    fastdpo plan --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name pairs.jsonl --device cuda --memory 24GiB

  the same for prompts of 600 tokens with answers of 400, before there is any data:
    fastdpo plan --model_name_or_path Qwen/Qwen2.5-7B-Instruct --length 600+400 --device cuda --memory 24GiB

  eight devices; and all figures, for another program:
    fastdpo plan --config run.yaml --device cuda --memory 80GB --devices 8 --json
"""


@dataclass
class PlanArguments:
    """For what machine, and for what data where there is none yet."""

    device: str | None = field(
        default=None, metadata={"help": "Kind of device: cpu, cuda, ... By default what a run here would use."}
    )
    memory: str | None = field(
        default=None, metadata={"help": "Memory of one device: 24GiB, 80GB. By default this machine's."}
    )
    reserve: str | None = field(
        default=None,
        metadata={
            "help": "What is left free of it. By default 1GiB on an accelerator, for its driver, and 0 on a CPU."
        },
    )
    devices: int | None = field(
        default=None, metadata={"help": "How many devices share the run. By default what --num_processes says, or one."}
    )
    stage: str | None = field(
        default=None,
        metadata={
            "help": "How they share it. By default what --accelerate_config says, or the first of DDP, ZeRO-2 and "
            "FSDP2 that fits.",
            "choices": [*STAGES],
        },
    )
    length: str | None = field(
        default=None,
        metadata={"help": "In the place of data: tokens of prompt and answer, 600+400; or of both together, 1000."},
    )
    json: bool = field(default=False, metadata={"help": "Print every figure as JSON, in bytes, and nothing else."})

    def __post_init__(self) -> None:
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices is {self.devices}; it should be at least 1")
        if self.stage is not None and self.device_count == 1:
            raise ValueError(f"stage is {self.stage}, which would have no effect with one device; give --devices")
        if self.length is not None:
            self.lengths  # noqa: B018  (raises)

    @property
    def device_count(self) -> int:
        return self.devices or 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a prompt, and of each of its two answers."""
        match = re.fullmatch(r"(\d+)(?:\+(\d+))?", self.length or "")
        prompt, answer = (int(part or 0) for part in match.groups()) if match else (0, 0)
        if match and match[2] is None:
            prompt, answer = prompt // 2, prompt - prompt // 2
        if min(prompt, answer) < 1:
            raise ValueError(f"length is {self.length!r}; it should be like 600+400, or like 1000")
        return prompt, answer


class PlanParser(TrainParser):
    """The flags of ``fastdpo train``, so that its command line and its files serve as they are, and a few."""

    command = "plan"
    launches = False
    summary = "what memory a training will need, and what fits, before any weights are loaded."
    dataclasses = (*TrainParser.dataclasses, PlanArguments)
    help_epilog = EPILOG
    others_title = "flags of `fastdpo train`, accepted as they are (--help_all describes them)"

    def _settle_launch(self, flags: LaunchFlags, asked: argparse.Namespace) -> None:
        settle_devices(flags, asked)

    def groups(self) -> dict[str, Sequence[str]]:
        lora = [f.name for f in fields(ModelArguments) if "lora" in f.name or f.name in ("use_peft", "use_dora")]
        return {
            "general": ["help", "help_all", "config"],
            "machine": [f.name for f in fields(PlanArguments) if f.name != "length"],
            "model": ["model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code"],
            "pairs": ["dataset_name", "length", "max_length", "packing"],
            "training": [
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "max_tokens_per_batch",
                "gradient_checkpointing",
                "precompute_ref_log_probs",
                "optim",
                "bf16",
                "fp16",
            ],
            "adapters": [*lora, "load_in_4bit", "load_in_8bit", "use_bnb_nested_quant"],
        }
