"""How a run's batches are laid out: the choice, and the look at the models that must wait for their weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import cast

from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import DataCollator

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.vision_collator import VisionCollator
from fastdpo.model.cut_check import check_cut
from fastdpo.model.load_balancing import calls_known_function
from fastdpo.model.load_sharding import shares_all_weights
from fastdpo.model.packing_choice import choose_packing, obstacles_in
from fastdpo.model.padded_parts import ACCELERATOR_FORWARD_COST, FORWARD_COST
from fastdpo.model.padding_check import dependence_on_padding
from fastdpo.model.randomness import has_dropout
from fastdpo.model.router_loss import is_loss_of_tokens
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer
from fastdpo.model.tree import MASKED_ON_CPU
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.models import compute_dtype
from fastdpo.trainer.parallelism import attention_of, cut_ranks, takes_packed_rows
from fastdpo.trainer.reference import Reference

logger = logging.getLogger(__name__)

# Each process has all of the model.
_WHOLE_MODELS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class BatchLayout:
    """Chooses the layout of a run's batches, and gives policy and reference the attention that they need.

    Args:
        policy: what is trained.
        reference: what it is compared with.
        args: the run's.
        accelerator: the run's.
        has_own_collator: the caller gave a collator.
        has_images: rows have images.
        has_aux_loss: the loss has a load-balancing term.
        weights_come_later: the models cannot be run yet: :meth:`look_once` does what is left.
        sequences_per_row: the most sequences of a dataset row; None where that is not known.

    Attributes:
        packing: the layout that was chosen, and why.

    Raises:
        NotImplementedError: the layout that ``args`` asks for does not suit; the message says why.
    """

    def __init__(
        self,
        policy: Scorer,
        reference: Reference,
        args: DPOConfig,
        accelerator: Accelerator,
        *,
        has_own_collator: bool,
        has_images: bool,
        has_aux_loss: bool,
        weights_come_later: bool,
        sequences_per_row: int | None = 2,
    ) -> None:
        self._row_tokens = _row_tokens(args, sequences_per_row)
        self._policy, self._args, self._accelerator = policy, args, accelerator
        self._cut = cut_ranks(accelerator)
        scorers = [policy] if reference.scorer is None else [policy, reference.scorer]
        has_own_aux_loss = has_aux_loss and not (
            calls_known_function(policy.lm) if weights_come_later else is_loss_of_tokens(policy, accelerator.device)
        )
        self.packing = choose_packing(
            args.packing,
            scorers,
            obstacles=obstacles_in(
                has_own_collator=has_own_collator,
                pad_to_multiple_of=args.pad_multiple,
                torch_compile=args.torch_compile,
                has_own_aux_loss=has_own_aux_loss,
                has_dropout=has_dropout(policy.model),
                has_images=has_images,
                is_cut=not takes_packed_rows(accelerator),
            ),
            max_length=args.max_length,
            device=accelerator.device,
            row_tokens=self._row_tokens,
            autocast=accelerator.autocast,
            unchecked=weights_come_later,
        )
        if args.padding_free and self.packing.layout == "padded":
            raise NotImplementedError(
                f"padding_free is on, but {self.packing.reasons[0]}. Leave it out for padded rows"
            )
        # Processes meet in every forward of a model that is sharded, and have to have as many; and where it is compiled
        # they cannot be kept from it. A load-balancing loss is of all tokens of a batch, whatever the model makes of
        # them. A sequence's images are not told apart.
        meets = accelerator.distributed_type not in _WHOLE_MODELS
        meets = meets or (args.torch_compile and accelerator.num_processes > 1)
        meets = meets or shares_all_weights(policy.model)
        cannot = has_own_collator or has_images or meets or has_own_aux_loss
        divides = self.packing.layout == "padded" and not cannot
        kind = accelerator.device.type
        self._forward_cost = FORWARD_COST.get(kind, ACCELERATOR_FORWARD_COST) if divides else None
        width = getattr(policy.lm.config.get_text_config(), "hidden_size", None)
        computes_masked = kind == "cpu" and self.packing.backend == "sdpa"
        self._masked_cost = MASKED_ON_CPU / width if computes_masked and width is not None else 0.0
        # A reference for the cache is asked before the training, and checked then.
        self._unchecked = ([policy] if args.precompute_ref_log_probs else scorers) if weights_come_later else []
        if accelerator.is_main_process:
            (logger.warning if self.packing.reasons else logger.info)("Batches are laid out in %s.", self.packing)
            if has_aux_loss and args.max_tokens_per_batch is not None:
                logger.info("The load-balancing loss is of the tokens of each part of a batch (max_tokens_per_batch).")
        if not weights_come_later:
            self._look_at_padding(scorers)
        policy.attention, policy.cut = attention_of(policy.model, self.packing, accelerator), self._cut
        reference.lay_out(self.packing)

    def collator(self, padded: DataCollator) -> DataCollator:
        """What makes such batches, where ``padded`` makes padded ones."""
        max_tokens = self._args.max_tokens_per_batch
        as_it_is = self.packing.layout == "padded" and max_tokens is None and self._forward_cost is None
        if as_it_is and not isinstance(padded, VisionCollator):
            return padded
        # Packed rows, or parts of a batch, are not chosen where the caller gave a collator.
        return RowCollator(
            self.packing.layout,
            cast(PreferenceCollator, padded),
            max_tokens,
            forward_cost=self._forward_cost,
            masked_cost=self._masked_cost,
        )

    def look_once(self, model: nn.Module) -> None:
        """What could not be looked at while the weights were not there; ``model`` is the policy as it is called now.

        Raises:
            NotImplementedError: a model does not suit; the message says why.
        """
        # First of all with its adapters: FSDP2 notes at the first forward which parameters are trained.
        self._policy.head.inspect_once(model)
        for scorer in self._unchecked:
            scorer = dataclasses.replace(scorer, root=model) if scorer is self._policy else scorer
            dtype = compute_dtype(self._accelerator, self._policy.model)
            self.packing.require(scorer, self._args.max_length, self._accelerator.device, dtype, self._row_tokens)
            self._look_at_padding([scorer])
            if self._cut is not None:
                with self._accelerator.autocast():
                    check_cut(scorer, self._accelerator.device, dtype)
        self._unchecked = []

    def _look_at_padding(self, scorers: Sequence[Scorer]) -> None:
        """Says so where padding changes what a model says of a sequence."""
        if self.packing.layout != "padded":
            return
        dtype = compute_dtype(self._accelerator, self._policy.model)
        for scorer in scorers:
            with self._accelerator.autocast():
                words = dependence_on_padding(scorer, self._args.max_length, self._accelerator.device, dtype)
            if words is not None:
                if self._accelerator.is_main_process:
                    logger.warning("%s.", words)
                break  # the other is of its kind, mostly


def _row_tokens(args: DPOConfig, sequences_per_row: int | None) -> int | None:
    """The most tokens that a packed row may have; None where nothing limits it."""
    if args.max_length is None or sequences_per_row is None:
        return args.max_tokens_per_batch
    most = sequences_per_row * args.max_length
    if args.max_tokens_per_batch is not None:
        return max(most, args.max_tokens_per_batch)  # a dataset row that has more is a packed row of its own
    return most * max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
