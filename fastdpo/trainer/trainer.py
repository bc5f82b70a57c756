"""DPO over ``transformers.Trainer``: its loop, devices, checkpoints, resume, callbacks and reporters, with our loss.

What is added is the loss, the reference model, the metrics, and a check that a run starts where it should.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.columns import any_may_have_images
from fastdpo.data.summary import DataSummary
from fastdpo.data.terms import has_references
from fastdpo.data.vision import tokenizer_in
from fastdpo.model.auto_class import has_vision
from fastdpo.model.head import FusedHead
from fastdpo.model.language_model import language_model
from fastdpo.model.load_sharding import is_load_sharded, shares_all_weights
from fastdpo.model.offloading import ActivationOffloading, check_offloading
from fastdpo.model.packing_choice import Packing
from fastdpo.model.scoring import Scorer, micro_batches, sums_of_rows
from fastdpo.ref_cache.build import CachedSplit
from fastdpo.trainer import fsdp1, fsdp2, zero
from fastdpo.trainer.arguments import check_arguments, check_distribution, find_unused_parameters
from fastdpo.trainer.batch_beta import BatchBeta
from fastdpo.trainer.batches import PairBatches
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.cut_models import CutModelRuns
from fastdpo.trainer.datasets import (
    DatasetPreparer,
    ProcessingClass,
    TrainDataset,
    columns_of,
    is_tokenised,
    make_collator,
    most_sequences,
)
from fastdpo.trainer.endings import Endings, look_at_endings
from fastdpo.trainer.expert_parallel import refuse_expert_parallel
from fastdpo.trainer.finite_runs import FiniteRuns, refuse_not_finite
from fastdpo.trainer.fsdp2 import keep_output_dtypes
from fastdpo.trainer.hub import HubUploads
from fastdpo.trainer.layout import BatchLayout
from fastdpo.trainer.lockstep import idle_parts, runs_in_step
from fastdpo.trainer.losses import BatchLosses
from fastdpo.trainer.lost_ranks import WatchedRanks
from fastdpo.trainer.measured import MeasuredRuns
from fastdpo.trainer.memory_advice import advising, memory_advice
from fastdpo.trainer.model_card import CardFacts, write_model_card
from fastdpo.trainer.model_look import ModelLook
from fastdpo.trainer.models import compute_dtype, fix_frequencies_of, make_models, settle_checkpointing
from fastdpo.trainer.moving_reference import MovingReference
from fastdpo.trainer.optimizers import check_optimizer_is_there
from fastdpo.trainer.parallelism import (
    check_images_cut,
    check_parallelism,
    cut_ranks,
    gathered_once,
    keep_attention,
    settle_sequences,
)
from fastdpo.trainer.promises import check_best_metric, check_reporters
from fastdpo.trainer.reference import Reference
from fastdpo.trainer.resumable import ResumableRuns
from fastdpo.trainer.saving import CarefulSaves
from fastdpo.trainer.start_check import check_start
from fastdpo.trainer.weights import check_comes_back

logger = logging.getLogger(__name__)


class DPOTrainer(
    WatchedRanks, PairBatches, HubUploads, MeasuredRuns, CarefulSaves, FiniteRuns, ResumableRuns, CutModelRuns
):
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
        processing_class: the tokenizer, or the processor of a vision-language model, whose rows may have images; by
            default the one that was saved with the model.
        callbacks, optimizers: as for ``Trainer``.
        peft_config: puts a new adapter on ``model``.

    Attributes:
        data_summaries: what :func:`fastdpo.data.prepare` said about each dataset that it tokenised, by name.
        packing: the layout that was chosen, and why.
        endings: in what completions end, and whether generation stops there; None without a tokenizer, and in all
            processes but the main one.

    Raises:
        TypeError, ValueError: an argument is not what it should be, or contradicts another.
        NotImplementedError: the model or the setup is not supported; the message names it.
        fastdpo.data.files.DataError: the dataset cannot be used.
        fastdpo.ref_cache.RefCacheError: the reference cache on disk belongs to another model, other data or settings.
    """

    # Narrower than Trainer has them.
    args: DPOConfig
    model: PreTrainedModel | PeftModel
    processing_class: ProcessingClass | None
    train_dataset: TrainDataset

    # compute_loss divides by the pairs of the accumulation window.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        *,
        data_collator: DataCollator | None = None,
        train_dataset: TrainDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessingClass | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
            args = DPOConfig(f"{name.rstrip('/').split('/')[-1]}-DPO")
        check_arguments(model, ref_model, args, data_collator, train_dataset, processing_class, peft_config)
        refuse_expert_parallel({"the model": model, "the reference model": ref_model}, args.init_kwargs)
        check_reporters(args)
        check_optimizer_is_there(args)
        assert train_dataset is not None
        set_seed(args.seed)  # a new adapter is random
        later = _weights_come_later(args)
        has_reference_columns = has_references(columns_of(train_dataset))
        images = any_may_have_images(train_dataset, eval_dataset)
        asks_reference = args.loss_options.takes_reference and not has_reference_columns
        policy, ref_model = make_models(
            model,
            ref_model,
            args,
            peft_config,
            needs_reference=asks_reference and not args.precompute_ref_log_probs,
            is_sharded=later,
            images=images,
        )
        check_parallelism(policy, ref_model, args)
        settle_sequences(args)
        if not later:
            refuse_not_finite({"the model": policy, "the reference model": ref_model})
        fix_frequencies_of((policy, ref_model), args)
        settle_checkpointing(policy, args)
        # What cannot be trained is refused before rows are prepared, which may take long.
        self._policy = Scorer(policy, policy, FusedHead(policy))
        if not later:
            self._policy.head.inspect(policy)
        source = model if isinstance(model, str) else language_model(policy).config._name_or_path
        self._preparer = DatasetPreparer(
            source,
            processing_class,
            args,
            needs_tokenizer=not is_tokenised(train_dataset),
            images=images,
            vocab_size=language_model(policy).config.get_text_config().vocab_size,
        )
        tokenizer = self._preparer.tokenizer
        padded = make_collator(policy, tokenizer, args) if data_collator is None else data_collator
        train_dataset = self._preparer.prepare_to_train(train_dataset)
        if self._preparer.has_images:
            find_unused_parameters(args)
        if isinstance(train_dataset, IterableDataset):
            # It would cut batches as if each tensor's rows were pairs.
            cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
        eval_dataset = self._preparer.prepare_all(eval_dataset, "eval")
        if data_collator is None:
            padded = self._preparer.collator(cast(PreferenceCollator, padded))

        super().__init__(
            model=policy,
            args=args,
            data_collator=padded,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        is_sharded = is_load_sharded(policy)
        if not (later or is_sharded) and self.is_world_process_zero():
            check_comes_back(policy, args.folder)
        kind = "FSDP" if self.is_fsdp_enabled or shares_all_weights(policy) else None
        kind = "DeepSpeed" if self.is_deepspeed_enabled else kind
        is_cut = is_sharded or cut_ranks(self.accelerator) is not None
        check_distribution(args, kind, is_cut=is_cut, mixes_images=self._preparer.mixes_images)
        if args.load_best_model_at_end:  # at the end of a training it would be late
            fsdp1.refuse_loading(self.accelerator, policy)
        self._takes_parts = data_collator is None and not (kind and is_cut)
        check_images_cut(self.accelerator, has_images=self._preparer.has_images)
        keep_attention(self.accelerator)
        if self.accelerator.is_fsdp2:
            keep_output_dtypes(self.accelerator)
        self._offloading: ActivationOffloading | None = None
        if args.activation_offloading:
            has_engine = self.is_deepspeed_enabled or self.is_fsdp_enabled
            check_offloading(args.device, is_sharded=has_engine, compiles=args.torch_compile)
            self._offloading = ActivationOffloading(policy, args.device)
        if self.is_deepspeed_enabled and not later:
            # Where it is looked at; DeepSpeed puts it there when the training begins.
            cast(nn.Module, policy).to(args.device)
        self._is_idle = False  # what is run counts nothing, and is run for others' sake
        self._start_is_checked = not args.loss_options.takes_reference
        self._policy.root = self.model
        self._reference = Reference(self._policy, ref_model, args, self.accelerator, in_columns=has_reference_columns)
        self._moving: MovingReference | None = None
        if args.sync_ref_model:
            assert ref_model is not None  # what could stand in its place was refused
            alpha, steps = args.mixup_alpha, args.sync_steps
            self._moving = MovingReference(policy, ref_model, alpha=alpha, steps=steps)
            self.add_callback(self._moving)
        # FSDP leaves the model where it was loaded until the training loop shards it.
        later = later or self.is_fsdp_enabled
        pictured = None if data_collator is not None else self._preparer.pictured
        self._look = ModelLook(
            self._policy,
            # One that makes the cache is looked at when it does, and is gone afterwards.
            None if later and args.precompute_ref_log_probs else self._reference.scorer,
            args,
            self.accelerator,
            None if pictured is None else lambda: self._prepare_inputs(padded([pictured])),
        )
        if not later:
            self._look.once()
        if type(self).evaluation_loop is DPOTrainer.evaluation_loop:  # another may have metrics of its own
            check_best_metric(args, eval_dataset, has_router_loss=bool(self._look.aux_loss_coef))
        self._batch_beta: BatchBeta | None = None
        if "beta_dpo" in args.loss_type:
            self._batch_beta = BatchBeta(self.accelerator, args.beta_dpo_threshold)
            self.add_callback(self._batch_beta)
        self._losses = BatchLosses(
            self._policy,
            self._reference,
            args.loss_options,
            self._look.aux_loss_coef,
            args.margin_alpha,
            self._batch_beta,
        )
        self._layout = BatchLayout(
            self._policy,
            self._reference,
            args,
            self.accelerator,
            has_own_collator=data_collator is not None,
            has_images=self._preparer.has_images,
            has_aux_loss=bool(self._look.aux_loss_coef),
            weights_come_later=later,
            sequences_per_row=most_sequences(train_dataset, eval_dataset),
        )
        self.data_collator = self._layout.collator(padded)
        self.endings = self._look_at_endings()
        if args.precompute_ref_log_probs:
            self._precompute_reference()

    def _look_at_endings(self) -> Endings | None:
        tokenizer = self._preparer.tokenizer
        if tokenizer is None or not self.is_world_process_zero():
            return None
        found = look_at_endings(self.train_dataset, self.model, tokenizer_in(tokenizer))
        made_here = bool(self.data_summaries) or isinstance(self.train_dataset, IterableDataset)
        doubts = found.doubts(were_made_here=made_here, is_adapter=isinstance(self.model, PeftModel))
        if doubts and self.args.strict:
            raise ValueError("; ".join(doubts))
        for doubt in doubts:
            logger.warning("%s.", doubt)
        return found

    @property
    def data_summaries(self) -> dict[str, DataSummary]:
        """What :func:`fastdpo.data.prepare` said about each dataset that it tokenised, by name."""
        return self._preparer.summaries

    @property
    def packing(self) -> Packing:
        """The layout that was chosen, and why."""
        return self._layout.packing

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own model; None where it has none."""
        return self._reference.model

    @property
    def reference_splits(self) -> dict[str, CachedSplit]:
        """With ``args.precompute_ref_log_probs``, what was read and computed for each dataset, by name."""
        return self._reference.splits

    def _precompute_reference(self) -> None:
        assert isinstance(self.train_dataset, Dataset)  # check_arguments refuses a stream
        with self.naming_lost_ranks("What was written of the reference's log-probabilities is kept"):
            self.train_dataset, self.eval_dataset = self._reference.precompute(
                self.train_dataset,
                self.eval_dataset,
                collate=self.data_collator,
                to_device=self._prepare_inputs,
                tokenizer=self.processing_class if self.data_summaries else None,
            )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        """As ``Trainer``'s; takes raw rows as well."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._preparer.prepare(eval_dataset, "evaluate")
        return super().get_eval_dataloader(eval_dataset)

    # ----------------------------------------------------------------------------------------------------------------
    # The loss
    # ----------------------------------------------------------------------------------------------------------------

    def pair_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair of a batch times its weight, and what metrics are made of, detached; [P] float64 each.

        ``inputs`` come from ``data_collator``, on the device; ``model`` may be wrapped.
        """
        return self._losses(model, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a training micro-batch: its share of the mean over pairs that count ``num_items_in_batch``.

        With ``return_outputs`` also what metrics are made of, each [B].
        """
        losses, per_pair = self.pair_losses(model, inputs)
        if self._is_idle:
            return losses.sum().to(torch.promote_types(self.model.dtype, torch.float32)) * 0
        self.watch.see_losses(sums_of_rows(losses, inputs), inputs.get("rows"))
        if not self._start_is_checked:
            self._start_is_checked = True
            if self.state.global_step == 0:
                dtype = compute_dtype(self.accelerator, self.model)
                check_start(per_pair, beta=self.args.beta, loss_types=self.args.loss_type, dtype=dtype)
        self.sums.add(per_pair)
        if num_items_in_batch is None:
            loss = losses.sum() / per_pair["weight"].sum()
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
            num_items_in_batch = self.weight_of(inputs) * self.accelerator.num_processes
        self._look_once(model)
        self.watch.begin_batch()
        total = torch.zeros((), device=self.args.device)
        # Gradient checkpointing runs layers again in the backward, which must find the same attention.
        attention = self._policy.attention
        attending = contextlib.nullcontext() if attention is None else attention.active()
        offloading = contextlib.nullcontext() if self._offloading is None else self._offloading.active()
        idle = idle_parts(self.accelerator, inputs, self.args.max_tokens_per_batch)
        with self._advising(training=True), attending, offloading:
            for i, part in enumerate((*parts, *idle)):
                # Processes may have different numbers of parts: they meet in the last one's backward.
                is_last = i + 1 == len(parts) + len(idle)
                self._is_idle = i >= len(parts)
                with contextlib.nullcontext() if is_last else self._before_the_last(model):
                    total = total + super().training_step(model, part, num_items_in_batch)
        self._is_idle = False
        return total

    @contextlib.contextmanager
    def _before_the_last(self, model: nn.Module) -> Iterator[None]:
        """A part's backward, after which there are others before gradients are whole."""
        if not runs_in_step(self.accelerator):
            with self.accelerator.no_sync(model):
                yield
            return
        # Sharded gradients are added up as they come, and need no room for whole ones; DeepSpeed would make its step.
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def _advising(self, *, training: bool) -> AbstractContextManager[None]:
        def advice() -> list[str]:
            return memory_advice(
                self.args,
                training=training,
                has_reference_model=self.ref_model is not None,
                has_adapter=isinstance(self._policy.model, PeftModel),
                is_sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
                is_stream=isinstance(self.train_dataset, IterableDataset),
                takes_parts=self._takes_parts,
                can_checkpoint=self._policy.lm.supports_gradient_checkpointing,
            )

        return advising("a training step" if training else "an evaluation", advice)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch. There are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        if self.deepspeed is not None:  # the engine, for which Trainer calls the model that is in it
            model = self.deepspeed
        self._look_once(model)
        idle = idle_parts(self.accelerator, inputs, self.args.max_tokens_per_batch)
        with torch.no_grad(), self.compute_loss_context_manager(), self._advising(training=False):
            losses, per_pair = self.pair_losses(model, inputs)
            for part in idle:
                self.pair_losses(model, part)
        # Row by row, because the last batch repeats rows to give every process as many, and these are cut off here.
        of_rows = torch.stack([sums_of_rows(values, inputs) for values in per_pair.values()], dim=-1)
        gathered = gathered_once(self.accelerator, of_rows)
        self.eval_sums.add(dict(zip(per_pair, gathered.unbind(-1), strict=True)))
        return losses.mean(), None, None

    def _look_once(self, model: torch.nn.Module) -> None:
        """Whatever could not be looked at in ``__init__``, where weights come later than the trainer."""
        self._look.once(model)
        self._losses.aux_loss_coef = self._look.aux_loss_coef
        self._layout.look_once(model)

    # ----------------------------------------------------------------------------------------------------------------
    # What a run leaves
    # ----------------------------------------------------------------------------------------------------------------

    def save_beside(self, checkpoint: Path) -> None:
        """Writes what moves with the run to a checkpoint: a reference that follows the policy, beta-DPO's M_0."""
        if self._moving is not None:
            self._moving.save(checkpoint)
        if self._batch_beta is not None:
            self._batch_beta.save(checkpoint)

    def bytes_beside(self) -> int:
        """The reference's weights, where it follows the policy."""
        return 0 if self._moving is None else self._moving.nbytes

    def load_beside(self, checkpoint: Path) -> None:
        """What :meth:`save_beside` wrote."""
        if self._moving is not None:
            self._moving.load(checkpoint)
        if self._batch_beta is not None:
            self._batch_beta.load(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s; where FSDP or DeepSpeed shards the model, whole weights also if checkpoints hold shards."""
        with contextlib.nullcontext() if _internal_call else self._whole_weights(), fsdp1.plain_names(self.model):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with fsdp1.plain_names(self.model):  # it saves shards of the model, too
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        fsdp1.refuse_loading(self.accelerator, self.model)
        super()._load_from_checkpoint(*args, **kwargs)

    def _whole_weights(self) -> AbstractContextManager[None]:
        if self.is_fsdp_enabled:
            return fsdp2.whole_weights(self.accelerator)
        return contextlib.nullcontext() if self.deepspeed is None else zero.whole_weights(self.deepspeed)

    def create_model_card(  # type: ignore[override]  # TRL's arguments, which come to the same calls
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: str | None,
    ) -> None:
        """Writes README.md; see :func:`fastdpo.trainer.model_card.write_model_card`."""
        if not self.is_world_process_zero():
            return
        facts = CardFacts(
            args=self.args,
            model=self._policy.model,  # around which FSDP's first version leaves something
            epochs=self.state.epoch,
            steps=self.state.global_step,
            log_history=self.state.log_history,
            has_chat_template=bool(getattr(self.processing_class, "chat_template", None)),
            takes_images=has_vision(self._policy.lm.config) and isinstance(self.processing_class, ProcessorMixin),
            are_groups="completion_ids" in columns_of(self.train_dataset),
        )
        write_model_card(facts, model_name=model_name, dataset_name=dataset_name, tags=tags, **metadata)


def _weights_come_later(args: DPOConfig) -> bool:
    """With ZeRO-3 and FSDP, processes may hold nothing of the model before the training loop has sharded it."""
    return bool(is_deepspeed_zero3_enabled() or args.fsdp or is_fsdp_enabled())
