"""DPOConfig: the training arguments of ``DPOTrainer``, named as TRL names them."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fastdpo.data.comparisons import PAIRS, Choice
from fastdpo.data.settings import SCORES, parse_date
from fastdpo.data.truncation import TRUNCATION_MODES
from fastdpo.loss.objectives import F_DIVERGENCES, OBJECTIVES
from fastdpo.loss.options import LossOptions
from fastdpo.model.liger_kernels import body_only
from fastdpo.model.packing import PACKINGS
from fastdpo.trainer.run_files import refuse_names, refuse_values
from fastdpo.trainer.secrets import redacted, remember_secrets


@dataclass(repr=False)
class DPOConfig(TrainingArguments):
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

    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the KL constraint: higher stays closer to the reference. IPO's tau."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"The loss, or several that are added up: {', '.join(OBJECTIVES)}. sigmoid is DPO."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Factors of several losses, in the order of loss_type. By default 1 each."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "The chance that a label is flipped, in [0, 0.5): sigmoid (cDPO), robust, exo_pair, ..."},
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence from the reference, of DPO's relatives.", "choices": list(F_DIVERGENCES)},
    )
    f_alpha_divergence_coef: float | None = field(
        default=None, metadata={"help": "Alpha of alpha_divergence. By default 0.5."}
    )
    ipo_reduction: str | None = field(
        default=None, metadata={"help": "ipo: log-ratios per token (mean, the default) or of sequences (sum)."}
    )
    discopop_tau: float | None = field(default=None, metadata={"help": "discopop: temperature. By default 0.05."})
    simpo_gamma: float | None = field(default=None, metadata={"help": "simpo: target margin. By default 0.5."})
    dpop_lambda: float | None = field(
        default=None, metadata={"help": "dpop: what falling below the reference costs the chosen. By default 50."}
    )
    beta_dpo_alpha: float | None = field(
        default=None, metadata={"help": "beta_dpo: how far beta follows the batch's margin. By default 0.6."}
    )
    beta_dpo_threshold: float | None = field(
        default=None,
        metadata={
            "help": "beta_dpo: the margin at which beta is --beta. By default the moving average of batches' margins."
        },
    )
    margin_alpha: float | None = field(
        default=None,
        metadata={
            "help": "ODPO: factor of the rows' column 'margin', which the margin of each pair is to exceed. By default "
            "that column is left out."
        },
    )
    sft_weight: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the chosen completion's negative log-likelihood, added to the loss (RPO's alpha). By "
            "default 1 with cpo and orpo, else 0."
        },
    )
    sft_reduction: str | None = field(
        default=None,
        metadata={
            "help": "That likelihood per token of its completion (sequence, the default) or of the batch (batch)."
        },
    )
    average_log_prob: bool = field(default=False, metadata={"help": "Means over tokens in the place of sums."})
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "LD-DPO: tokens beyond the pair's shorter completion count this much, in [0, 1]."},
    )
    ld_reference: str | None = field(
        default=None, metadata={"help": "LD-DPO: weigh the reference's tokens too (both, the default) or not (policy)."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weigh pairs by how likely they are under the policy."}
    )

    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "TR-DPO: a reference that follows the policy, every ref_model_sync_steps steps."},
    )
    ref_model_mixup_alpha: float | None = field(
        default=None,
        metadata={
            "help": "sync_ref_model: how much of the policy the reference becomes, in (0, 1]. By default 0.6; 1 copies "
            "it, and is what an adapter needs."
        },
    )
    ref_model_sync_steps: int | None = field(
        default=None, metadata={"help": "sync_ref_model: steps from one time to the next. By default 512."}
    )

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Most tokens of prompt and completion together; the rest is cut. None: no limit."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a sequence that is too long to keep.", "choices": list(TRUNCATION_MODES)},
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Token to pad with. By default the tokenizer's, or else its end-of-sequence token."},
    )
    padding_free: bool = field(
        default=False, metadata={"help": "No padding: packed rows, or an error where these do not suit."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=None,
        metadata={"help": "Round the length of a batch up to a multiple of this. auto is none."},
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Stop where a pair would be dropped, or is doubtful, before anything is trained."},
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Rows with several ranked or scored answers: which two are compared. Each answer is computed once. "
            "By default all of rows with 'completions', and neighbours of other formats, which become pairs.",
            "choices": list(PAIRS),
        },
    )
    weight_by_score: bool = field(
        default=False, metadata={"help": "Count each of these pairs as much as its scores (or ranks) differ."}
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Join pairs of one prompt to a row, in which each answer is computed once. Batch sizes count such "
            "rows. Of a stream, pairs within 1,000 rows."
        },
    )
    score: str = field(
        default="assistant",
        metadata={
            "help": "Which answers of a completion that has several turns are scored: all of the assistant's, or the "
            "last. What lies between them never is.",
            "choices": list(SCORES),
        },
    )
    end_token: str | None = field(
        default=None,
        metadata={"help": "Special token to append to answers after which the chat template writes none."},
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to use in the place of the tokenizer's: a Jinja file, or the name of one of TRL's, "
            "where TRL is installed, such as qwen3_training."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "What chat templates that write the date take for today: 2026-03-01. By default, today."},
    )
    packing: str = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out: shared (packed rows, what sequences begin with in common once), repeated "
            "(packed rows, the prompt before each completion), padded (a padded row for each completion); auto: the "
            "first that suits the model.",
            "choices": list(PACKINGS),
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Take the pairs of a batch in parts of at most this many tokens, one after another, to save "
            "memory. The steps and their gradients are the same."
        },
    )
    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep activations in the host's memory between forward and backward: less of a GPU's, for time."
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes to tokenize with."})

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
        self._take_trls_defaults()
        refuse_values(self)
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
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
        if self.margin_alpha is not None:
            options.check_margins("margin_alpha")
            if not math.isfinite(self.margin_alpha):
                raise ValueError(f"margin_alpha is {self.margin_alpha}; it should be finite")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode is {self.truncation_mode!r}; it should be one of {', '.join(TRUNCATION_MODES)}"
            )
        Choice(self.pairs, self.weight_by_score)  # raises
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}; it should be one of {', '.join(SCORES)}")
        # One day for all of the run: for its rows, and for what its reference is bound to.
        self.template_date = (parse_date(self.template_date) or datetime.date.today()).isoformat()
        if self.packing not in PACKINGS:
            raise ValueError(f"packing is {self.packing!r}; it should be one of {', '.join(PACKINGS)}")
        if self.padding_free and (self.packing == "padded" or self.pad_to_multiple_of is not None):
            other = "packing is 'padded'" if self.packing == "padded" else "pad_to_multiple_of is given"
            raise ValueError(f"padding_free is on, and {other}; leave one of them out")
        self._settle_liger()
        counts = ("max_length", "max_tokens_per_batch", "pad_to_multiple_of", "dataset_num_proc")
        for name in (*counts, "precompute_ref_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1, or None")
        self._check_sizes()
        if self.ref_cache is not None:
            self.precompute_ref_log_probs = True
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            raise ValueError(
                f"precompute_ref_batch_size is {self.precompute_ref_batch_size}, but precompute_ref_log_probs is off: "
                "turn it on, or leave the batch size out"
            )
        self._check_sync()
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
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.bf16 and not torch.accelerator.is_available() and not is_torch_xla_available():
            self.use_cpu = True  # where it would run anyway: transformers refuses bfloat16 unless that is said
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch warns of it
        # Whether someone did, or it is on by default: another model may have none.
        self.asks_checkpointing = bool(self.activation_checkpointing or self.gradient_checkpointing)
        # transformers calls it activation_checkpointing, and warns about the older name that everyone's scripts use.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing is not False
        super().__post_init__()  # type: ignore[no-untyped-call]
        remember_secrets(vars(self))

    def _take_trls_defaults(self) -> None:
        """A value that is TRL's default, which a file of all of a run's settings gives, is ours for "by default"."""
        for name, default in (
            ("f_alpha_divergence_coef", 0.5),
            ("discopop_tau", 0.05),
            ("ref_model_mixup_alpha", 0.6),
            ("ref_model_sync_steps", 512),
        ):
            if getattr(self, name) == default:
                setattr(self, name, None)
        if isinstance(self.pad_to_multiple_of, str):  # as the command line and YAML have it
            words = self.pad_to_multiple_of
            if words.lower() in ("auto", "none", "null"):  # auto is a multiple on Neuron alone, which is not supported
                self.pad_to_multiple_of = None
            elif words.isdecimal():
                self.pad_to_multiple_of = int(words)
            else:
                raise ValueError(f"pad_to_multiple_of is {words!r}; it should be a number, auto, or None")

    def _settle_liger(self) -> None:
        """Liger's kernels without its head: Trainer puts them into the model once more, and is told so, too."""
        if not self.use_liger_kernel:
            if self.liger_kernel_config is not None:
                raise ValueError(
                    "liger_kernel_config is given, but use_liger_kernel is off: turn it on, or leave it out"
                )
            return
        self.liger_kernel_config = body_only(self.liger_kernel_config)

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

    def _check_sync(self) -> None:
        idle = [name for name in ("ref_model_mixup_alpha", "ref_model_sync_steps") if getattr(self, name) is not None]
        if idle and not self.sync_ref_model:
            raise ValueError(
                f"{idle[0]} is {getattr(self, idle[0])}, but sync_ref_model is off: leave it out, or turn it on"
            )
        if not 0 < self.mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha is {self.mixup_alpha}; it should be above 0 and at most 1")
        if self.sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps is {self.sync_steps}; it should be at least 1")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model moves the reference, whose log-probabilities of the start precompute_ref_log_probs (or "
                "ref_cache) keeps: leave one of them out"
            )
        if self.sync_ref_model and not self.loss_options.takes_reference:
            raise ValueError(
                f"sync_ref_model moves the reference, and {self.loss_options.described} has none: leave it out"
            )

    @property
    def pad_multiple(self) -> int | None:
        """``pad_to_multiple_of``, which is no text any more once this object is made."""
        return cast("int | None", self.pad_to_multiple_of)

    @property
    def mixup_alpha(self) -> float:
        """``ref_model_mixup_alpha``, or its default."""
        return 0.6 if self.ref_model_mixup_alpha is None else self.ref_model_mixup_alpha

    @property
    def sync_steps(self) -> int:
        """``ref_model_sync_steps``, or its default."""
        return 512 if self.ref_model_sync_steps is None else self.ref_model_sync_steps

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

    @property
    def loss_options(self) -> LossOptions:
        """The options of the loss; ValueError where they do not fit together."""
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})
