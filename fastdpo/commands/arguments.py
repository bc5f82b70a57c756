"""The flags of a run beside its training arguments: which pairs, which model, and what the report shows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastdpo.report.snapshot import SnapshotSize
from fastdpo.trainer.without_effect import refuse_without_effect


@dataclass
class ScriptArguments:
    """Which pairs."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Pairs: a Hub dataset, folders, or files (.jsonl, .json, .parquet, .arrow, .csv, .tsv; text also "
            "compressed: .gz, .bz2, .xz, .zst), one after another."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where it has several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split, or slice of one, to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split, or slice of one, to evaluate on when --eval_strategy is not 'no'."}
    )
    format: str | None = field(
        default=None,
        metadata={"help": "Format of the pairs, where it cannot be told: a name of docs/data.md, or FILE.py:FUNCTION."},
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of other names: prompt=question,chosen=good,rejected=bad."}
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={"help": "A mixture, as a list in --config: entries with path, name, data_files, split, fraction."},
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share, or number, of the pairs to hold out, and to evaluate on."}
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read pairs as they are needed, for sets larger than memory. Needs --max_steps."},
    )
    streaming: bool = field(default=False, metadata={"help": "The same, as TRL's mixtures call it."})
    ignore_bias_buffers: bool = field(
        default=False, metadata={"help": "DDP: leave out buffers that are bool, such as masks, which some cannot send."}
    )
    dataset_shuffle_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Streamed pairs come in random order from among so many; 0 for their own order. By default 10,000, "
            "or 1,000 where they have images, of which the files are in memory meanwhile."
        },
    )

    @property
    def names(self) -> list[str]:
        """What ``dataset_name`` names."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name or []

    @property
    def is_streamed(self) -> bool:
        return self.dataset_streaming or self.streaming

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, list) and len(self.dataset_name) == 1:  # the one, as in TRL
            (self.dataset_name,) = self.dataset_name  # type: ignore[assignment]  # a list is what the parser makes
        if self.dataset_shuffle_buffer is not None and self.dataset_shuffle_buffer < 0:
            raise ValueError(f"dataset_shuffle_buffer is {self.dataset_shuffle_buffer}; it should be at least 0")
        refuse_without_effect(self)


@dataclass
class ModelArguments:
    """Which model, LoRA, and weights in 4 or 8 bits under it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model to start from: a Hub id, or a folder written by save_pretrained. An adapter's is trained "
            "further, with what it was as the reference."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    dtype: str | None = field(
        default="float32",
        metadata={"help": "Type of the loaded weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention to use: sdpa, eager, flash_attention_2, ..."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the model itself stays as it is."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; chosen by the model's type if not given."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters (rather than modules) that get an adapter, as in some MoE models."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole, beside the adapter."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task type in the adapter's configuration."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: magnitude and direction learnt apart."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the model's weights in 4 bits, under an adapter. Needs bitsandbytes."},
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The model's weights in 8 bits, under an adapter."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Which numbers 4 bits stand for.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "4 bits: the scales of the weights in 8 bits as well."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "4 bits: type of the tensors that hold them. By default uint8.",
            "choices": ["uint8", "float16", "bfloat16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            given = getattr(self, name)  # also with commas between names, which are no part of any
            if isinstance(given, list) and all(re.fullmatch(r"[\w.]+(,\s*[\w.]+)*,?", word) for word in given):
                setattr(self, name, [part.strip() for word in given for part in word.split(",") if part.strip()])
        # A pattern, or "all-linear", PEFT takes as a string only; and a string for a pattern, which a bare name as
        # one is not: it would have to be the whole of the module's name.
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            (target,) = self.lora_target_modules
            if not re.fullmatch(r"[\w.]+", target):
                self.lora_target_modules = target  # type: ignore[assignment]  # a list is what the parser makes
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both given; leave one of them out")
        refuse_without_effect(self)


@dataclass
class ReportArguments:
    """What report.html shows of the policy, before and after training."""

    report_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Pairs whose implicit rewards are drawn; 0 for none. By default up to 64: as many as take little "
            "of the run's time, completions included at most a tenth (or 4 seconds)."
        },
    )
    report_samples: int | None = field(
        default=None,
        metadata={"help": "Prompts that are completed, greedily; 0 for none. By default up to 4, as time allows."},
    )
    report_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of such a completion. By default up to 64, as time allows."}
    )

    def __post_init__(self) -> None:
        for name, least in (("report_pairs", 0), ("report_samples", 0), ("report_max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it should be at least {least}")

    def size(self) -> SnapshotSize:
        return SnapshotSize(self.report_pairs, self.report_samples, self.report_max_new_tokens)
