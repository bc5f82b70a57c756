"""DPO over ``transformers.Trainer``: its loop, devices, checkpoints, resume, callbacks and reporters, with our loss.

What is added is the loss, the reference model, the metrics, and a check that a run starts where it should.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.trainer_utils import EvalLoopOutput

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.prepare import REFERENCE_COLUMNS, PreferenceCollator, prepare
from fastdpo.data.streaming import prepare_stream
from fastdpo.data.summary import DataSummary
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.model.adapters import adapters_are_neutral, copy_of_what_is_trained
from fastdpo.model.head import FusedHead
from fastdpo.model.packing import PackedRow, RowCollator
from fastdpo.model.packing_choice import choose_packing, obstacles_in
from fastdpo.model.scoring import Scorer, count_pairs, count_tokens, in_pair_order, micro_batches, model_inputs
from fastdpo.ref_cache.build import CachedSplit
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.fsdp2 import keep_output_dtypes, reshard, shard_without_optimizer, whole_weights
from fastdpo.trainer.hub import HubUploads
from fastdpo.trainer.memory_advice import advising
from fastdpo.trainer.model_card import write_model_card
from fastdpo.trainer.pair_metrics import add_sums, means_of
from fastdpo.trainer.reference import Reference
from fastdpo.trainer.setup import (
    aux_loss_coef,
    check_arguments,
    check_trainable,
    columns_of,
    compute_dtype,
    disable_dropout,
    find_tokenizer,
    has_dropout,
    is_tokenised,
    load_model,
    pad_token_id,
)
from fastdpo.trainer.start_check import check_start
from fastdpo.trainer.throughput import Throughput

logger = logging.getLogger(__name__)

# The per-token outputs of the policy that metrics are made of.
_OUTPUTS = ("entropy", "mean_logits", "is_top1")


class DPOTrainer(HubUploads):
    """Trains ``model`` on preference pairs with a DPO loss.

    Rows have ``chosen``, ``rejected`` and, unless these begin with it, ``prompt``, as strings or as message lists; or
    they are tokenised already (``prompt_ids``, ``chosen_ids``, ``rejected_ids``) and taken as they are. Rows with
    ``ref_chosen_logps`` and ``ref_rejected_logps`` (the reference's log-probabilities, summed over each completion,
    with ``args.ld_alpha`` weighted as the loss has them) need no reference model; nor do losses without a reference.

    Otherwise the reference is ``ref_model``, or ``model`` as it is now: of a PEFT model with a new adapter, that is the
    model with the adapter off; with an adapter that was trained before, a frozen copy of the adapter on the same base;
    of any other model, a second one. With ``args.precompute_ref_log_probs`` it is asked once, before training, and
    freed; what it said is kept in ``args.ref_cache``, and read from there the next time.

    Logged, under TRL's names, over all that was seen since the last time, and with ``eval_`` before them in
    evaluation: ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``,
    ``logps/chosen``, ``logps/rejected`` (means over pairs); ``logits/chosen``, ``logits/rejected``, ``entropy``
    (means over completion tokens); ``mean_token_accuracy`` (over the chosen tokens); ``aux_loss`` (mixtures of
    experts); in training, ``num_tokens`` (all so far), ``pairs_per_second``, ``tokens_per_second`` and
    ``peak_memory_gib`` (see :mod:`fastdpo.trainer.throughput`).

    The loss and its gradient are the mean over all pairs of an optimiser step, however these are split into
    micro-batches and devices, and however they are laid out (``args.packing``).

    Args:
        model: a name or path, or a causal language model, or one with a PEFT adapter. The name of an adapter stands for
            the adapter on its base, to be trained further.
        ref_model: the reference. By default see above.
        args: by default ``DPOConfig("<model>-DPO")``.
        data_collator: by default ``fastdpo.data.PreferenceCollator``, whose batches another one must also make.
        train_dataset, eval_dataset: ``datasets.Dataset``; for evaluation also a dict of them. To train on, also a
            ``datasets.IterableDataset``, whose rows are tokenised as they are needed.
        processing_class: the tokenizer; by default the one that was saved with the model.
        callbacks, optimizers: as for ``Trainer``.
        peft_config: puts a new adapter on ``model``.

    Attributes:
        data_summaries: what :func:`fastdpo.data.prepare` said about each dataset that it tokenised, by name.
        packing: the layout that was chosen, and why.

    Raises:
        TypeError, ValueError: an argument is not what it should be, or contradicts another.
        NotImplementedError: the model or the setup is not supported; the message names it.
        fastdpo.data.files.DataError: the dataset cannot be used.
        fastdpo.ref_cache.RefCacheError: the reference cache on disk belongs to another model, other data or settings.
    """

    # compute_loss divides by the pairs of the accumulation window.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        *,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
            args = DPOConfig(f"{name.rstrip('/').split('/')[-1]}-DPO")
        check_arguments(model, ref_model, args, train_dataset, processing_class, peft_config)

        set_seed(args.seed)  # a new adapter is random
        name = model if isinstance(model, str) else None
        model = load_model(name, args) if name else model
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        check_trainable(model, args, is_sharded=_weights_come_later(args))
        has_reference_columns = set(REFERENCE_COLUMNS) <= set(columns_of(train_dataset))
        self._loss_options = args.loss_options
        needs_reference = self._loss_options.takes_reference and not has_reference_columns
        if ref_model is None and needs_reference and not args.precompute_ref_log_probs:
            if not isinstance(model, PeftModel):
                ref_model = load_model(name, args) if name else copy.deepcopy(model)
            elif _weights_come_later(args):
                # Whether an adapter that was given is new cannot be seen yet: the check at the first step finds out.
                if name and peft_config is None:
                    raise NotImplementedError(
                        f"{name} is an adapter, whose reference would be a copy of it, which is not supported with "
                        "FSDP or DeepSpeed ZeRO-3 yet. Merge it into its base (merge_and_unload), and give peft_config"
                    )
            elif not adapters_are_neutral(model):
                ref_model = copy_of_what_is_trained(model)
        for network in (model, ref_model):
            if network is not None and args.disable_dropout:
                disable_dropout(network)

        self._processing_class_source = name or model.config._name_or_path
        self.data_summaries: dict[str, DataSummary] = {}
        if processing_class is None:
            processing_class = find_tokenizer(
                self._processing_class_source, args, needed=not is_tokenised(train_dataset)
            )
        has_own_collator = data_collator is not None
        if has_own_collator and args.max_tokens_per_batch is not None:
            raise ValueError(
                f"max_tokens_per_batch is {args.max_tokens_per_batch}, but data_collator is given, and makes the "
                "batches; leave one of them out"
            )
        if data_collator is None:
            data_collator = PreferenceCollator(
                pad_token_id=pad_token_id(model, processing_class, args.pad_token),
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        train_dataset = self._prepare(train_dataset, "train", processing_class, args)
        if isinstance(train_dataset, IterableDataset):
            args.accelerator_config.dispatch_batches = False  # it would cut batches as if each tensor's rows were pairs
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: self._prepare(rows, key, processing_class, args) for key, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare(eval_dataset, "eval", processing_class, args)

        self._policy = Scorer(model, model, FusedHead(model))
        if not _weights_come_later(args):
            self._policy.head.inspect(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._throughput = Throughput()
        self.add_callback(self._throughput)
        self._check_distribution(ref_model)
        if self.accelerator.is_fsdp2:
            keep_output_dtypes(self.accelerator)
        self._aux_loss_coef = aux_loss_coef(model, args)
        self._sums: dict[str, Tensor] | None = None
        self._eval_sums: dict[str, Tensor] | None = None
        self._start_is_checked = False
        self._policy.root = self.model
        self._reference = Reference(self._policy, ref_model, args, self.accelerator, in_columns=has_reference_columns)
        self._choose_packing(has_own_collator)
        if args.precompute_ref_log_probs:
            self._precompute_reference()

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own model; None where it has none."""
        return self._reference.model

    @property
    def reference_splits(self) -> dict[str, CachedSplit]:
        """With ``args.precompute_ref_log_probs``, what was read and computed for each dataset, by name."""
        return self._reference.splits

    # ----------------------------------------------------------------------------------------------------------------
    # Data
    # ----------------------------------------------------------------------------------------------------------------

    def _prepare(
        self, dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase | None, args: DPOConfig
    ) -> Dataset:
        streamed = name == "train" and isinstance(dataset, IterableDataset)
        if not isinstance(dataset, Dataset) and not streamed:
            raise TypeError(f"the {name} dataset is a {type(dataset).__name__}; it should be a datasets.Dataset")
        if is_tokenised(dataset):
            return dataset
        if tokenizer is None:
            tokenizer = find_tokenizer(self._processing_class_source, args, needed=True)
        if streamed:
            return prepare_stream(
                dataset,
                tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                strict=args.strict,
            )
        with args.main_process_first(desc=f"tokenizing the {name} dataset"):
            dataset, self.data_summaries[name] = prepare(
                dataset,
                tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
                batch_size=args.per_device_train_batch_size,
                strict=args.strict,
            )
        return dataset

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As ``Trainer``'s; takes raw rows as well."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, "evaluate", self.processing_class, self.args)
        return super().get_eval_dataloader(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # What Trainer keeps of the rows; its own guess is what the model's forward takes.
        self._signature_columns = [*TOKEN_COLUMNS, *REFERENCE_COLUMNS]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of an optimiser step, and how many pairs all of them have, on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(map(count_pairs, batches)), device=device)
        return batches, self.accelerator.gather(pairs).sum()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # The epoch and the batch to begin with. Trainer asks whether it is at the end after a step: one too many.
        begin = super()._init_training_state(*args, **kwargs)
        if self.state.global_step < self.state.max_steps:
            return begin
        if self.is_world_process_zero():
            logger.warning(
                "No step is made: the checkpoint is of step %d, and the run ends at step %d.",
                self.state.global_step,
                self.state.max_steps,
            )
        return self.state.num_train_epochs, 0

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, PackedRow) else super()._prepare_input(data)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Of the sequences, each with its prompt: as many in every layout.
        if self.args.include_num_input_tokens_seen != "no":
            padding = self.args.include_num_input_tokens_seen == "all"
            tokens = torch.as_tensor(count_tokens(inputs, padding=padding), device=self.args.device)
            self.state.num_input_tokens_seen += self.accelerator.gather(tokens).sum().item()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As ``Trainer``'s, of the tokens that go through the model."""
        return sum(super(DPOTrainer, self).floating_point_ops({"input_ids": ids}) for ids in model_inputs(inputs))

    # ----------------------------------------------------------------------------------------------------------------
    # The layout of batches
    # ----------------------------------------------------------------------------------------------------------------

    def _choose_packing(self, has_own_collator: bool) -> None:
        """Sets ``packing``, the collator that makes such batches, and the attention that they need."""
        args, policy = self.args, self._policy
        scorers = [policy] if self._reference.scorer is None else [policy, self._reference.scorer]
        # FSDP leaves the model where it was loaded until the training loop shards it.
        later = _weights_come_later(args) or self.is_fsdp_enabled
        self.packing = choose_packing(
            args.packing,
            scorers,
            obstacles=obstacles_in(
                args,
                has_own_collator=has_own_collator,
                has_aux_loss=bool(self._aux_loss_coef),
                has_dropout=has_dropout(policy.model),
            ),
            max_length=args.max_length,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
            unchecked=later,
        )
        # A reference for the cache is asked before the training, and checked then.
        self._rows_to_check = ([policy] if args.precompute_ref_log_probs else scorers) if later else []
        if self.is_world_process_zero():
            (logger.warning if self.packing.reasons else logger.info)("Batches are laid out in %s.", self.packing)
        policy.attention = self.packing.attention_of(policy.model)
        self._reference.lay_out(self.packing)
        if self.packing.layout != "padded" or args.max_tokens_per_batch is not None:
            self.data_collator = RowCollator(self.packing.layout, self.data_collator, args.max_tokens_per_batch)

    def _precompute_reference(self) -> None:
        self.train_dataset, self.eval_dataset = self._reference.precompute(
            self.train_dataset,
            self.eval_dataset,
            collate=self.data_collator,
            to_device=self._prepare_inputs,
            tokenizer=self.processing_class if self.data_summaries else None,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # The loss
    # ----------------------------------------------------------------------------------------------------------------

    def pair_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair of a batch [B] float64, and what metrics are made of, each detached, [B] float64.

        ``inputs`` come from ``data_collator``, on the device; ``model`` may be wrapped.
        """
        parts = [self._losses_of_part(model, part) for part in micro_batches(inputs)]
        losses = in_pair_order([losses for losses, _ in parts], inputs)
        return losses, {name: in_pair_order([sums[name] for _, sums in parts], inputs) for name in parts[0][1]}

    def _losses_of_part(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        # The reference goes first: what the policy keeps for its backward is then not yet there.
        ref_sums = self._reference.sums(model, inputs)
        kwargs = {"output_router_logits": True} if self._aux_loss_coef else {}
        outputs = (*_OUTPUTS, "log_sum_sq_probs") if self._loss_options.use_weighting else _OUTPUTS
        at_shorter = self._loss_options.ld_alpha is not None
        out = self._policy.score(inputs, outputs, root=model, at_shorter=at_shorter, **kwargs)
        losses_of = PairLosses(self._loss_options, out.lengths, ref_sums)
        losses = losses_of(out.sums, out.outputs, 0, len(out.sums) // 2)
        chosen_rewards, rejected_rewards = losses_of.rewards(out.sums)
        chosen, rejected = losses_of.logps(out.sums.detach()).chunk(2)
        chosen_tokens, rejected_tokens = out.tokens.chunk(2)
        chosen_logits, rejected_logits = out.outputs["mean_logits"].chunk(2)
        chosen_entropy, rejected_entropy = out.outputs["entropy"].chunk(2)
        sums = {
            "pairs": torch.ones_like(chosen),
            "tokens": chosen_tokens + rejected_tokens,
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
            "chosen_reward": chosen_rewards,
            "rejected_reward": rejected_rewards,
            "accuracy": chosen_rewards > rejected_rewards,
            "margin": chosen_rewards - rejected_rewards,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            "chosen_logits": chosen_logits,
            "rejected_logits": rejected_logits,
            "entropy": chosen_entropy + rejected_entropy,
            "chosen_top1": out.outputs["is_top1"].chunk(2)[0],
        }
        if self._aux_loss_coef:
            losses = losses + self._aux_loss_coef * out.model_output.aux_loss
            sums["aux_loss"] = out.model_output.aux_loss.expand_as(losses)
        sums["loss"] = losses
        return losses, {name: values.detach().double() for name, values in sums.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a training micro-batch: its share of the mean over ``num_items_in_batch`` pairs.

        With ``return_outputs`` also what metrics are made of, each [B].
        """
        losses, per_pair = self.pair_losses(model, inputs)
        if not self._start_is_checked:
            self._start_is_checked = True
            if self.state.global_step == 0 and self._loss_options.takes_reference:
                dtype = compute_dtype(self.accelerator, self.model)
                check_start(per_pair, beta=self.args.beta, loss_types=self.args.loss_type, dtype=dtype)
        self._sums = add_sums(self._sums, {name: values.sum() for name, values in per_pair.items()})
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # DDP and its kind take the mean of the devices' gradients, where the sum is wanted.
            loss = losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
        loss = loss.to(torch.promote_types(self.model.dtype, torch.float32))
        return (loss, per_pair) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As ``Trainer``'s, of each micro-batch that the batch is taken in; gradients add up."""
        parts = micro_batches(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = count_pairs(inputs) * self.accelerator.num_processes
        self._look_at_model_once(model)
        total = torch.zeros((), device=self.args.device)
        # Gradient checkpointing runs layers again in the backward, which must find the same attention.
        attention = self._policy.attention
        attention = contextlib.nullcontext() if attention is None else attention.active()
        with self._advising(training=True), attention:
            for i, part in enumerate(parts):
                # Processes may have different numbers of parts: they meet in the last one's backward.
                is_last = i + 1 == len(parts)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    total = total + super().training_step(model, part, num_items_in_batch)
        return total

    def _advising(self, *, training: bool) -> AbstractContextManager[None]:
        return advising(
            self.args,
            training=training,
            has_reference_model=self.ref_model is not None,
            has_adapter=isinstance(self.model, PeftModel),
            is_sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )

    def _look_at_model_once(self, model: nn.Module) -> None:
        """What could not be looked at while the weights were not there."""
        # First of all with its adapters: FSDP2 notes at the first forward which parameters are trained.
        self._policy.head.inspect_once(model)
        for scorer in self._rows_to_check:
            scorer = dataclasses.replace(scorer, root=model) if scorer is self._policy else scorer
            dtype = compute_dtype(self.accelerator, self.model)
            self.packing.require(scorer, self.args.max_length, self.accelerator.device, dtype)
        self._rows_to_check = []

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch. There are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        self._look_at_model_once(model)
        with torch.no_grad(), self.compute_loss_context_manager(), self._advising(training=False):
            losses, per_pair = self.pair_losses(model, inputs)
        # Pair by pair, because the last batch repeats pairs to give every process as many, and these are cut off here.
        gathered = self.accelerator.gather_for_metrics(torch.stack(list(per_pair.values()), dim=-1)).sum(0)
        self._eval_sums = add_sums(self._eval_sums, dict(zip(per_pair, gathered, strict=True)))
        return losses.mean(), None, None

    # ----------------------------------------------------------------------------------------------------------------
    # Metrics
    # ----------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer``'s; adds the metrics since the last time to the training loss."""
        if "loss" in logs and self._sums is not None:
            totals = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            sums = dict(zip(self._sums, totals.tolist(), strict=True))
            tokens = None if self.args.include_num_input_tokens_seen == "no" else self.state.num_input_tokens_seen
            logs.update(means_of(sums) | self._throughput.rates(sums["pairs"], tokens))
            if tokens is not None:
                logs["num_tokens"] = tokens
            self._sums = None
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As ``Trainer``'s; adds the metrics, so that one of them can choose the best checkpoint."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models and self.optimizer is None:
            # Before the training, which will find the model sharded. Trainer asks accelerate, which refuses.
            self.accelerator._models.append(shard_without_optimizer(self.accelerator, self.model))
        self._eval_sums = None
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self.accelerator.is_fsdp2 and self.optimizer is None:
            reshard(self.model)
        if self._eval_sums is not None:
            sums = {name: total.item() for name, total in self._eval_sums.items()}
            # Trainer's own mean counts a short batch of several processes as a full one.
            metrics = {"loss": sums["loss"] / sums["pairs"], **means_of(sums)}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s; where FSDP shards the model, whole weights also if checkpoints hold shards."""
        whole = self.is_fsdp_enabled and not _internal_call
        with whole_weights(self.accelerator) if whole else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: str | None,
    ) -> None:
        """Writes README.md; see :func:`fastdpo.trainer.model_card.write_model_card`."""
        if self.is_world_process_zero():
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags, **metadata)

    def _check_distribution(self, ref_model: nn.Module | None) -> None:
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                f"{self.args.n_gpu} devices are visible to one process, for which Trainer uses nn.DataParallel. Start "
                "one process per device (torchrun, accelerate launch), or show it one (CUDA_VISIBLE_DEVICES)"
            )
        kind = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None
        if kind and self.args.max_tokens_per_batch is not None:
            raise NotImplementedError(
                f"max_tokens_per_batch is not supported with {kind}: its processes must run the model equally often. "
                "Use a smaller per_device_train_batch_size, with gradient_accumulation_steps"
            )
        has_reference = ref_model is not None or self.args.precompute_ref_log_probs
        if kind and has_reference and not self.accelerator.is_fsdp2:
            raise NotImplementedError(
                f"a reference model, or precompute_ref_log_probs, is not supported with {kind}. Use FSDP2 "
                "(fsdp_version: 2 in accelerate's configuration), or give the dataset the columns ref_chosen_logps and "
                "ref_rejected_logps, or train an adapter (peft_config), for which the reference is the model without it"
            )


def _weights_come_later(args: DPOConfig) -> bool:
    """With ZeRO-3 and FSDP, processes may hold nothing of the model before the training loop has sharded it."""
    return bool(is_deepspeed_zero3_enabled() or args.fsdp or is_fsdp_enabled())
