"""The rows of a run made ready for it, once its models are there: tokenised, and with what makes batches of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from datasets import IterableDataset
from transformers import DataCollator
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.language_model import language_model
from fastdpo.trainer.arguments import find_unused_parameters
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import (
    DatasetPreparer,
    EvalDataset,
    ProcessingClass,
    TrainDataset,
    is_tokenised,
    make_collator,
)
from fastdpo.trainer.engines import refuse_mixed_images
from fastdpo.trainer.setup import Setup


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a run.

    Attributes:
        preparer: made them, and makes others that are evaluated on.
        train, evaluation: tokenised.
        padded: makes padded batches of them, or is the caller's own.
    """

    preparer: DatasetPreparer
    train: TrainDataset
    evaluation: EvalDataset
    padded: DataCollator


def prepare_rows(
    setup: Setup,
    args: DPOConfig,
    source: str | None,
    *,
    train_dataset: TrainDataset,
    eval_dataset: EvalDataset,
    processing_class: ProcessingClass | None,
    data_collator: DataCollator | None,
) -> PreparedRows:
    """Prepares the datasets of a :class:`fastdpo.trainer.DPOTrainer`, and settles what of ``args`` depends on them.

    Args:
        setup: what the run begins with.
        args: the run's.
        source: the name or path of the model; None for one that was given.
        train_dataset, eval_dataset, processing_class, data_collator: the trainer's.

    Raises:
        fastdpo.data.files.DataError: rows cannot be used.
        ValueError, OSError: there is no tokenizer, or there are no rows for a batch.
        NotImplementedError: rows with images and without are not supported with the run's engine.
    """
    lm = language_model(setup.policy)
    preparer = DatasetPreparer(
        lm.config._name_or_path if source is None else source,
        processing_class,
        args,
        needs_tokenizer=not is_tokenised(train_dataset),
        images=setup.images,
        vocab_size=lm.config.get_text_config().vocab_size,
    )
    padded = make_collator(setup.policy, preparer.tokenizer, args) if data_collator is None else data_collator
    train_dataset = preparer.prepare_to_train(train_dataset)
    if preparer.has_images:
        find_unused_parameters(args)
    if isinstance(train_dataset, IterableDataset):
        # It would cut batches as if each tensor's rows were pairs.
        cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
    eval_dataset = preparer.prepare_all(eval_dataset, "eval")
    if preparer.mixes_images:
        refuse_mixed_images(setup.engine)
    if data_collator is None:
        padded = preparer.collator(cast(PreferenceCollator, padded))
    return PreparedRows(preparer, train_dataset, eval_dataset, padded)
