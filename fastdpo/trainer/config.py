"""DPOConfig: the training arguments of ``DPOTrainer``, named as TRL names them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fastdpo.model.liger_kernels import body_only
from fastdpo.trainer.loss_arguments import LossArguments
from fastdpo.trainer.row_arguments import RowArguments
from fastdpo.trainer.run_files import refuse_names, refuse_values
from fastdpo.trainer.secrets import redacted, remember_secrets
from fastdpo.trainer.without_effect import refuse_without_effect


@dataclass(repr=False)
class DPOConfig(RowArguments, LossArguments, TrainingArguments):  # of whose fields the last one's come first
    """Training arguments of :class:`DPOTrainer`: those of ``transformers.TrainingArguments``, and these.

    Names and defaults are those of TRL's ``DPOConfig``, except:

    - ``bf16``: on where there is an accelerator that computes in it, and off on a CPU (TRL: on everywhere). Asked for
      without an accelerator, it runs on the CPU (TRL: raises unless ``use_cpu`` is given).
    - ``include_num_input_tokens_seen``: ``non_padding``, for the metric ``num_tokens`` to survive a resume.
    - ``precompute_ref_log_probs``: keeps them on disk, in ``ref_cache``, and reads them from there the next time.
    - ``logging_nan_inf_filter``: off, and cannot be turned on: it writes another number in the place of NaN.
    - ``padding_free``: no padding, or an error (TRL 1.16: warns, and pads).
    - ``use_liger_kernel``: Liger's kernels in the layers of policy and reference; the head and the loss stay ours.
    - ``loss_type``: SimPO, ORPO and CPO as well, which need no reference. Options of the losses are those of
      :class:`fastdpo.LossOptions`, None for its default; ``label_smoothing`` makes ``sigmoid`` cDPO, where TRL ignores
      it, and ``sft`` is each completion's mean over tokens unless ``sft_reduction`` is ``batch``, as TRL has it.

    An option that has no effect with the others raises ``ValueError``; so does an argument of ``TrainingArguments``
    that has none here. A name that other versions of TRL and transformers have raises ``TypeError``, with what to use
    instead.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every X update steps; below 1, X is a share of all steps."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not supported: a run stops where its loss is no number."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass, to save memory. On by default."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # None until this machine was asked
        default=None,
        metadata={"help": "Mixed precision in bfloat16. By default on where the accelerator computes in bfloat16."},
    )
    include_num_input_tokens_seen: str | bool = field(
        default="non_padding",
        metadata={"help": "Which tokens num_tokens counts: all, non_padding, or no for no such metric."},
    )

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities once, before training, keep them on disk, and free the "
            "reference."
        },
    )
    ref_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the reference's log-probabilities; turns precompute_ref_log_probs on. Read if they are "
            "there, refused if they belong to another model or other data. By default _ref_cache in output_dir."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs a device for precompute_ref_log_probs. By default as for training and evaluation."},
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "JSON, arguments of from_pretrained for a model given by name; dtype is float32 by default."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model or the tokenizer."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Mixture of experts: weight of the load-balancing loss. By default the model's; 0 for none."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the policy and the reference to 0."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> DPOConfig:
        refuse_names(kwargs, (each.name for each in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._settle_losses()
        self._settle_rows()
        if self.ref_cache is not None:  # a folder for them turns them on
            self.precompute_ref_log_probs = True
        if self.report_to is None:  # as a file may say it
            self.report_to = "none"
        refuse_values(self)
        refuse_without_effect(self)
        self._check_sizes()
        self._check_losses()
        self._check_rows()
        self._check_batches_of_losses()
        self._settle_liger()
        self._check_reference()
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter is on, which writes another number in the place of a loss that is NaN; leave "
                "it out: a run stops there, and says on which rows"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but it is cross-entropy's and DPO has "
                "none; label_smoothing is the chance that a preference is flipped"
            )
        self._settle_device()
        # Whether someone did, or it is on by default: another model may have none.
        self.asks_checkpointing = bool(self.activation_checkpointing or self.gradient_checkpointing)
        # transformers calls it activation_checkpointing, and warns about the older name that everyone's scripts use.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing is not False
        super().__post_init__()  # type: ignore[no-untyped-call]
        remember_secrets(vars(self))

    def _check_batches_of_losses(self) -> None:
        """Raises ValueError where a batch cannot be what the loss takes."""
        options = self.loss_options
        if options.of_rankings and (self.weight_by_score or self.group_by_prompt):
            name = "weight_by_score" if self.weight_by_score else "group_by_prompt"
            raise ValueError(
                f"{name} is on, and {options.described} is a loss of rankings, not of pairs; leave one of them out"
            )
        if options.of_rankings and self.pairs not in (None, "all"):
            raise ValueError(
                f"pairs is {self.pairs!r}, and {options.described} is a loss of rankings, of all answers of a row; "
                "leave it out"
            )
        if self.max_tokens_per_batch is not None and not self.is_divisible:
            what = f"loss_type {', '.join(self.loss_type)}" if options.couples_pairs else "sft_reduction='batch'"
            raise ValueError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, which takes a batch in parts, but with {what} a "
                "pair's loss depends on the whole batch; leave one of them out"
            )
        if "beta_dpo" in self.loss_type and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but with loss_type beta_dpo every "
                "pair's beta depends on the whole batch, which has to be taken at once: give a "
                "per_device_train_batch_size of all of it (a LoRA adapter makes room for it), or more processes"
            )

    def _settle_liger(self) -> None:
        """Liger's kernels without its head: Trainer puts them into the model once more, and is told so, too."""
        if self.use_liger_kernel:
            self.liger_kernel_config = body_only(self.liger_kernel_config)

    def _check_reference(self) -> None:
        """Raises ValueError for arguments of the reference that do not go together."""
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ValueError(
                f"precompute_ref_batch_size is {self.precompute_ref_batch_size}; it should be at least 1, or None"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model moves the reference, whose log-probabilities of the start precompute_ref_log_probs (or "
                "ref_cache) keeps: leave one of them out"
            )

    def _settle_device(self) -> None:
        """What the machine has says what was left open."""
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.bf16 and not torch.accelerator.is_available() and not is_torch_xla_available():
            self.use_cpu = True  # where it would run anyway: transformers refuses bfloat16 unless that is said
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch warns of it

    def _check_sizes(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; it should be a finite number, 0 or above")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs}; it should be above 0, or max_steps should be given"
            )

    def to_dict(self) -> dict[str, Any]:
        """As ``TrainingArguments``', for reporters; without the secrets in it, however deep they are."""
        values: dict[str, Any] = redacted(super().to_dict())  # type: ignore[no-untyped-call]
        return values

    def __str__(self) -> str:
        lines = [f"{name}={value},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__

    @property
    def folder(self) -> Path:
        """``output_dir``, which is named once this object is made."""
        return Path(cast(str, self.output_dir))

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """``model_init_kwargs``, which are no text any more once this object is made; empty for none."""
        return dict(cast(dict[str, Any], self.model_init_kwargs or {}))

    @property
    def keeps_groups(self) -> bool:
        """Whether several answers to a prompt stay one row, of whatever format they are."""
        return self.pairs is not None or self.loss_options.of_rankings

    @property
    def is_divisible(self) -> bool:
        """Whether a batch's loss is the same where it is taken in parts."""
        return not self.loss_options.couples_pairs and self.sft_reduction != "batch"
