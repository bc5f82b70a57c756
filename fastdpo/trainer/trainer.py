"""DPO over ``transformers.Trainer``: its loop, devices, checkpoints, resume, callbacks and reporters, with our loss.

What is added is the loss, the reference model, the metrics, and a check that a run starts where it should.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel, ProcessorMixin, TrainerCallback

from fastdpo.data.summary import DataSummary
from fastdpo.data.vision import tokenizer_in
from fastdpo.model.auto_class import has_vision
from fastdpo.model.packing_choice import Packing
from fastdpo.ref_cache.build import CachedSplit
from fastdpo.trainer.batch_beta import BatchBeta
from fastdpo.trainer.batches import PairBatches
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.cut_models import CutModelRuns
from fastdpo.trainer.datasets import ProcessingClass, TrainDataset, columns_of, most_sequences
from fastdpo.trainer.endings import Endings, look_at_endings
from fastdpo.trainer.finite_runs import FiniteRuns
from fastdpo.trainer.fsdp2 import keep_output_dtypes
from fastdpo.trainer.hub import HubUploads
from fastdpo.trainer.layout import BatchLayout
from fastdpo.trainer.losses import BatchLosses
from fastdpo.trainer.lost_ranks import WatchedRanks
from fastdpo.trainer.measured import MeasuredRuns
from fastdpo.trainer.model_card import CardFacts, write_model_card
from fastdpo.trainer.model_look import ModelLook
from fastdpo.trainer.pair_steps import PairSteps
from fastdpo.trainer.parallelism import check_images_cut, keep_attention
from fastdpo.trainer.prepared import prepare_rows
from fastdpo.trainer.promises import check_best_metric
from fastdpo.trainer.reference import Reference
from fastdpo.trainer.resumable import ResumableRuns
from fastdpo.trainer.saving import CarefulSaves
from fastdpo.trainer.setup import set_up
from fastdpo.trainer.sharded_saves import ShardedSaves

logger = logging.getLogger(__name__)


class DPOTrainer(
    PairSteps,
    ShardedSaves,
    WatchedRanks,
    PairBatches,
    HubUploads,
    MeasuredRuns,
    CarefulSaves,
    FiniteRuns,
    ResumableRuns,
    CutModelRuns,
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
        setup = set_up(
            model,
            ref_model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
        )
        assert train_dataset is not None
        policy, later = setup.policy, setup.weights_come_later
        self._policy, self._offloading = setup.scorer, setup.offloading
        rows = prepare_rows(
            setup,
            args,
            model if isinstance(model, str) else None,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
        )
        self._preparer, padded = rows.preparer, rows.padded

        super().__init__(
            model=policy,
            args=args,
            data_collator=padded,
            train_dataset=rows.train,
            eval_dataset=rows.evaluation,
            processing_class=rows.preparer.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._takes_parts = data_collator is None and not (setup.engine and setup.is_cut)
        check_images_cut(self.accelerator, has_images=rows.preparer.has_images)
        keep_attention(self.accelerator)
        if self.accelerator.is_fsdp2:
            keep_output_dtypes(self.accelerator)
        if self.is_deepspeed_enabled and not later:
            # Where it is looked at; DeepSpeed puts it there when the training begins.
            cast(nn.Module, policy).to(args.device)
        self._is_idle = False
        self._start_is_checked = not args.loss_options.takes_reference
        self._policy.root = self.model
        self._reference = Reference(
            self._policy, setup.ref_model, args, self.accelerator, in_columns=setup.has_reference_columns
        )
        self._moving = setup.moving
        if self._moving is not None:
            self._moving.held = lambda: (self._reference.held(), self.model)
            self.add_callback(self._moving)
        # FSDP leaves the model where it was loaded until the training loop shards it.
        later = later or self.is_fsdp_enabled
        pictured = None if data_collator is not None else rows.preparer.pictured
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
            check_best_metric(args, rows.evaluation, has_router_loss=bool(self._look.aux_loss_coef))
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
            has_images=rows.preparer.has_images,
            has_aux_loss=bool(self._look.aux_loss_coef),
            weights_come_later=later,
            sequences_per_row=most_sequences(rows.train, rows.evaluation),
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

    def save_beside(self, checkpoint: Path) -> None:
        """Writes what moves with the run to a checkpoint: a reference that follows the policy, beta-DPO's M_0."""
        if self._moving is not None:
            self._moving.save(checkpoint, writes=self.args.should_save)
        if self._batch_beta is not None and self.args.should_save:
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
