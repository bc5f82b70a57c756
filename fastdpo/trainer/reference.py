"""What a run's loss compares the policy with: another model, the policy without its adapter, or columns of the data."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.terms import REFERENCE_COLUMNS
from fastdpo.logps.wide import wide_dtype, widened
from fastdpo.loss.pair_losses import combine_segments
from fastdpo.model.adapters import adapters_are_neutral
from fastdpo.model.cut_check import check_cut
from fastdpo.model.head import FusedHead
from fastdpo.model.language_model import language_model
from fastdpo.model.load_sharding import is_load_sharded, shares_all_weights
from fastdpo.model.model_check import check_causal
from fastdpo.model.packing_choice import Packing
from fastdpo.model.scoring import Scorer, are_alike, count_sequences, evaluating, pairs_of
from fastdpo.ref_cache.build import CachedSplit, ReferenceBuilder
from fastdpo.ref_cache.files import DEFAULT_FOLDER
from fastdpo.ref_cache.fingerprints import base_weights, joined_fingerprint, tensor_fingerprint
from fastdpo.ref_cache.identity import reference_identity, row_words
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import EvalDataset
from fastdpo.trainer.frozen import hold_frozen, is_divided_later, let_go, meets_in_forwards
from fastdpo.trainer.fsdp2 import keep_requires_grad
from fastdpo.trainer.lockstep import idle_parts
from fastdpo.trainer.models import compute_dtype
from fastdpo.trainer.parallelism import attention_of
from fastdpo.trainer.secrets import redacted
from fastdpo.trainer.zero import copied, is_partitioned, of_whole, zero_stage


class Reference:
    """A run's reference, and what it says about batches.

    Args:
        policy: the model that is trained. Without ``model`` it is the reference itself, its adapter off.
        model: the reference's own model, which is frozen; sharded, where the policy is.
        args: the run's.
        accelerator: the run's.
        in_columns: the training data has the reference's log-probabilities.

    Attributes:
        scorer: of the reference's own model; None where it has none.
        splits: what :meth:`precompute` read and computed, by the dataset's name.
    """

    def __init__(
        self,
        policy: Scorer,
        model: PreTrainedModel | PeftModel | None,
        args: DPOConfig,
        accelerator: Accelerator,
        *,
        in_columns: bool,
    ) -> None:
        self._policy, self._args, self._accelerator = policy, args, accelerator
        self._loss_options = args.loss_options
        self._is_cached = in_columns or args.precompute_ref_log_probs
        self._packing = Packing("padded")
        self._is_held = False  # what computes the cache
        self.scorer: Scorer | None = None
        self.splits: dict[str, CachedSplit] = {}
        if model is not None:
            head = FusedHead(model.requires_grad_(False).eval())
            self.scorer = Scorer(self._prepare(model), model, head)

    @property
    def model(self) -> nn.Module | None:
        """The reference's own model, as it is called; None where it has none."""
        return None if self.scorer is None else self.scorer.root

    def held(self) -> nn.Module:
        """The module that has its own model's weights: the one that was given, or what FSDP's first version made."""
        assert self.scorer is not None
        is_flat = isinstance(self.scorer.root, FullyShardedDataParallel)
        return self.scorer.root if is_flat else self.scorer.model

    def lay_out(self, packing: Packing) -> None:
        """Take batches in this layout, which has been found to suit the reference, or will be."""
        self._packing = packing
        if self.scorer is not None:
            self.scorer.cut = self._policy.cut
            self.scorer.attention = attention_of(self.scorer.model, packing, self._accelerator)

    def sums(self, policy: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Its log-probabilities of a micro-batch, with no gradient; None where the loss takes no reference.

        Args:
            policy: the model that is trained, as it is called now.
            inputs: from :func:`fastdpo.model.scoring.micro_batches`.

        Returns:
            [2P, n] float64, as :meth:`fastdpo.model.scoring.SequenceScores.in_pairs` has them; [2P, 1] from the
            columns, which have the loss's weights of tokens in them. Of a loss of rankings [S, 1], of the sequences.

        Raises:
            ValueError: the reference was cached and let go, and these rows were not among those it was asked about.
        """
        if not self._loss_options.takes_reference:
            return None
        of_rankings = self._loss_options.of_rankings
        if of_rankings and ("ref_ranked_logps" in inputs or REFERENCE_COLUMNS[0] in inputs):
            return _of_sequences(inputs)
        if all(name in inputs for name in REFERENCE_COLUMNS):
            return widened(torch.cat([inputs[name] for name in REFERENCE_COLUMNS])).unsqueeze(1)
        if self._is_cached:
            raise ValueError(
                "this dataset has no columns ref_chosen_logps and ref_rejected_logps, and there is no reference model "
                "to compute them: they were cached for train_dataset and eval_dataset, and the reference freed. Give "
                "the dataset to DPOTrainer as eval_dataset, or train with precompute_ref_log_probs=False"
            )
        with torch.no_grad():
            if self.scorer is not None:
                return self._score(self.scorer, inputs)
            adapted = self._accelerator.unwrap_model(policy)
            with keep_requires_grad(adapted), adapted.disable_adapter(), evaluating(policy):
                return self._score(self._policy, inputs, root=policy)

    def precompute(
        self,
        train_dataset: Dataset,
        eval_dataset: EvalDataset,
        *,
        collate: DataCollator,
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    ) -> tuple[Dataset, EvalDataset]:
        """The datasets with the reference's log-probabilities, by way of the disk; its own model is let go.

        Args:
            train_dataset, eval_dataset: tokenised.
            collate: makes a batch of rows.
            to_device: puts a batch on the device.
            tokenizer: what tokenised the data, or the processor that did; None where it came tokenised.

        Raises:
            fastdpo.ref_cache.RefCacheError: see :class:`fastdpo.ref_cache.build.ReferenceBuilder`.
        """
        args, accelerator = self._args, self._accelerator
        by_pair = args.ld_alpha is not None and args.ld_reference != "policy"
        datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        if by_pair and any("completion_ids" in rows.column_names for rows in datasets if rows is not None):
            raise ValueError(
                "ld_alpha weighs the reference's tokens by the other completion of each pair, so that a group's answer "
                "has no one log-probability to be kept; give ld_reference='policy', or leave precompute_ref_log_probs "
                "and ref_cache out"
            )
        model = (self.scorer or self._policy).model
        # An adapter that changes nothing yet is left aside, so that the key does not depend on its random start.
        bare: PeftModel | None = None
        if isinstance(model, PeftModel) and self._is_neutral(model):
            bare = model
        weights = model.state_dict(keep_vars=True) if bare is None else base_weights(bare)
        found_together: str | None = None
        if any(map(is_partitioned, weights.values())):
            # Which takes all processes, while the main one is asked about the rest alone.
            found_together = joined_fingerprint(of_whole(weights, tensor_fingerprint))

        def score(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
            scorer, batch = self._held_scorer(), to_device(collate(rows))
            at_shorter = self._loss_options.ld_alpha is not None
            # Elsewhere processes need not have as many batches either.
            meets = meets_in_forwards(accelerator)
            idle = idle_parts(accelerator, batch, args.max_tokens_per_batch) if meets else []
            sums = scorer.score(batch, at_shorter=at_shorter).in_pairs().sums
            for part in idle:
                scorer.score(part, at_shorter=at_shorter)
            chosen, rejected = combine_segments(sums, self._loss_options, of_policy=False).chunk(2)
            return chosen, rejected

        @functools.cache
        def identity() -> dict[str, Any]:
            return reference_identity(
                language_model(model),
                found_together or weights,
                tokenizer,
                collate,
                accelerator.mixed_precision,
                None if args.ld_reference == "policy" else args.ld_alpha,
                args.template_date,
                casts_weights=zero_stage(accelerator) is not None,
            )

        if is_load_sharded(model):
            identity()  # by all processes together, which hold a part of the weights each
        builder = ReferenceBuilder(
            root=Path(args.ref_cache or args.folder / DEFAULT_FOLDER),
            accelerator=accelerator,
            identity=identity,
            score=score,
            max_length=args.max_length,
            about={"model": redacted(language_model(model).config._name_or_path or type(model).__name__)},
            describe_row=lambda row: row_words(row, tokenizer),
            show_progress=not args.disable_tqdm,
            in_step=meets_in_forwards(accelerator) or shares_all_weights(model),
            by_pair=by_pair,
        )
        train_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        eval_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        with (
            torch.no_grad(),
            # FSDP2 casts the weights themselves, the policy's as well.
            contextlib.nullcontext() if accelerator.is_fsdp2 else accelerator.autocast(),
            evaluating(model),
            contextlib.nullcontext() if bare is None else bare.disable_adapter(),
        ):
            train_dataset = builder.with_columns(train_dataset, "train", train_size)
            eval_dataset = builder.with_columns_in_all(eval_dataset, "eval", eval_size)
        self.splits = builder.splits
        self._let_go()
        return train_dataset, eval_dataset

    def _prepare(self, model: PreTrainedModel | PeftModel) -> nn.Module:
        """``model`` held as the policy is in training; one for the cache is whole until the cache lacks something."""
        if self._args.precompute_ref_log_probs and meets_in_forwards(self._accelerator):
            return model
        self._is_held = True
        return hold_frozen(self._accelerator, model)

    def _held_scorer(self) -> Scorer:
        """Of what computes the cache, held as it is in training: the model that was given, or the policy as it is now.

        FSDP shards the policy itself later, with its optimiser: here a copy. DeepSpeed puts it into its precision, and
        divides it, as it will for the training, and lets go of it.
        """
        if self._is_held or not is_divided_later(self._accelerator):
            return self._policy if self.scorer is None else self.scorer
        self._is_held = True
        if self.scorer is None and zero_stage(self._accelerator) is None:
            model = copied(self._policy.model).requires_grad_(False)  # its modes too: evaluation, adapters off
            attention = attention_of(model, self._packing, self._accelerator)
            self.scorer = Scorer(model, model, FusedHead(model), attention, self._policy.cut)
        scorer = self._policy if self.scorer is None else self.scorer
        scorer.root = hold_frozen(self._accelerator, scorer.root)
        dtype = compute_dtype(self._accelerator, self._policy.model)
        self._packing.require(scorer, self._args.max_length, self._accelerator.device, dtype)
        if scorer.cut is not None:
            check_cut(scorer, self._accelerator.device, dtype)
        if self.scorer is not None and not are_alike(self._policy, scorer):
            check_causal(scorer, self._accelerator.device, dtype)
        return scorer

    def _let_go(self) -> None:
        """Nothing computes the cache any more."""
        if self._is_held:
            scorer = self._policy if self.scorer is None else self.scorer
            let_go(self._accelerator, scorer.root)
            scorer.root = scorer.model
            del scorer  # the last that holds it
        self.scorer, self._is_held = None, False
        gc.collect()  # what FSDP has sharded is held by circles

    def _is_neutral(self, model: PeftModel) -> bool:
        if any(map(is_partitioned, model.parameters())):
            self._held_scorer()  # it cannot run otherwise, and all processes run it
            return adapters_are_neutral(model)
        if is_load_sharded(model):
            return adapters_are_neutral(model)  # all processes run it
        return bool(self._in_main_process(lambda: adapters_are_neutral(model)))

    def _score(self, scorer: Scorer, inputs: dict[str, Any], root: nn.Module | None = None) -> Tensor:
        found = scorer.score(inputs, root=root, at_shorter=self._loss_options.ld_alpha is not None)
        return found.sums if self._loss_options.of_rankings else found.in_pairs().sums

    def _in_main_process(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives in the main process, in all; the others may hold no weights yet."""
        outcome = [work() if self._accelerator.is_main_process else None]
        broadcast_object_list(outcome)
        return outcome[0]


def _of_sequences(inputs: dict[str, Any]) -> Tensor:
    """[S, 1] from what a micro-batch's columns say of its pairs and of its rankings."""
    pairs = pairs_of(inputs)
    sums = torch.zeros(count_sequences(inputs), dtype=wide_dtype(pairs.device), device=pairs.device)
    if REFERENCE_COLUMNS[0] in inputs:
        said = torch.cat([inputs[name] for name in REFERENCE_COLUMNS])
        sums = sums.index_copy(0, pairs.t().flatten(), said.to(sums.dtype))
    if "ref_ranked_logps" in inputs:
        is_there = inputs["rankings"] >= 0
        sums = sums.index_copy(0, inputs["rankings"][is_there], inputs["ref_ranked_logps"][is_there].to(sums.dtype))
    return sums.unsqueeze(1)
