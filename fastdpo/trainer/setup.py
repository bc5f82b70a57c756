"""What a run begins with, before its rows are prepared: its arguments and models, and that they can be trained.

To prepare rows, and then to ask a reference for its cache, may take hours: what can be refused before is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from accelerate import FullyShardedDataParallelPlugin
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from fastdpo.data.columns import any_may_have_images
from fastdpo.data.terms import has_references
from fastdpo.data.vocabulary import check_padding
from fastdpo.model.head import FusedHead
from fastdpo.model.load_sharding import is_load_sharded, shares_all_weights
from fastdpo.model.offloading import ActivationOffloading, check_offloading
from fastdpo.model.scoring import Scorer
from fastdpo.trainer.arguments import check_arguments
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import EvalDataset, TrainDataset, columns_of
from fastdpo.trainer.engines import check_distribution, engine_of, weights_come_later
from fastdpo.trainer.expert_parallel import check_expert_setting
from fastdpo.trainer.finite_runs import refuse_not_finite
from fastdpo.trainer.fsdp1_loading import refuse_loading
from fastdpo.trainer.models import fix_frequencies_of, make_models, settle_checkpointing
from fastdpo.trainer.moving_reference import MovingReference
from fastdpo.trainer.optimizers import check_optimizer
from fastdpo.trainer.parallelism import check_parallelism, cuts_sequences, settle_sequences
from fastdpo.trainer.promises import check_reporters
from fastdpo.trainer.weights import check_comes_back
from fastdpo.trainer.zero import refuse_adapter_on_head


@dataclass(frozen=True)
class Setup:
    """What a run begins with.

    Attributes:
        policy: what is trained, as it was given or loaded, with its adapter.
        scorer: of the policy.
        ref_model: the reference's own model; None where it has none.
        has_reference_columns: the rows to train on have the reference's log-probabilities.
        images: rows may have some.
        engine: what shards the model over processes, FSDP or DeepSpeed; None where each holds all of it.
        is_cut: processes have parts of layers or of sequences.
        weights_come_later: processes may hold nothing of the model before the training loop has sharded it.
        moving: takes the reference along with the policy; None where it stands still.
        offloading: moves activations to the host's memory; None where they stay.
    """

    policy: PreTrainedModel | PeftModel
    scorer: Scorer
    ref_model: PreTrainedModel | PeftModel | None
    has_reference_columns: bool
    images: bool
    engine: str | None
    is_cut: bool
    weights_come_later: bool
    moving: MovingReference | None
    offloading: ActivationOffloading | None


def set_up(
    model: str | PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    args: DPOConfig,
    *,
    data_collator: Any,
    train_dataset: TrainDataset | None,
    eval_dataset: EvalDataset,
    processing_class: Any,
    peft_config: PeftConfig | None,
) -> Setup:
    """Checks the arguments of a :class:`fastdpo.trainer.DPOTrainer`, and makes its models.

    Raises:
        TypeError, ValueError, NotImplementedError: as the trainer does.
    """
    check_arguments(model, ref_model, args, data_collator, train_dataset, processing_class, peft_config)
    if isinstance(model, str):
        check_expert_setting(args.init_kwargs)
    check_reporters(args)
    check_optimizer(args)
    engine = engine_of(args)
    check_distribution(args, engine, is_cut=cuts_sequences(args))
    if engine == "FSDP" and _loads_a_checkpoint(args):
        refuse_loading(FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {})))
    if args.activation_offloading:
        check_offloading(args.device, is_sharded=engine is not None, compiles=args.torch_compile)
    set_seed(args.seed)  # a new adapter is random
    later = weights_come_later(args)
    has_reference_columns = has_references(columns_of(cast(TrainDataset, train_dataset)))
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
    refuse_adapter_on_head(policy)
    check_parallelism(policy, ref_model, args)
    settle_sequences(args)
    if not later:
        refuse_not_finite({"the model": policy, "the reference model": ref_model})
    fix_frequencies_of((policy, ref_model), args)
    settle_checkpointing(policy, args)
    scorer = Scorer(policy, policy, FusedHead(policy))
    if not later:
        scorer.head.inspect(policy)
        config = scorer.lm.config.get_text_config()
        if (config.pad_token_id or 0) >= config.vocab_size:  # with which no model can be made, nor loaded again
            check_padding(config.pad_token_id, config.vocab_size, None)
        if not is_load_sharded(policy) and args.process_index == 0:
            check_comes_back(policy, args.folder)
    moving = None
    if args.sync_ref_model:
        assert ref_model is not None  # what could stand in its place was refused
        moving = MovingReference(policy, ref_model, alpha=args.mixup_alpha, steps=args.sync_steps)
    return Setup(
        policy,
        scorer,
        ref_model,
        has_reference_columns,
        images,
        engine="FSDP" if shares_all_weights(policy) else engine,
        is_cut=is_load_sharded(policy) or cuts_sequences(args),
        weights_come_later=later,
        moving=moving,
        offloading=ActivationOffloading(policy, args.device) if args.activation_offloading else None,
    )


def _loads_a_checkpoint(args: DPOConfig) -> bool:
    """Whether the run is to go on from one, or to end with the best."""
    resumes = str(args.resume_from_checkpoint or False).lower() not in ("false", "no", "0")
    return resumes or args.load_best_model_at_end
