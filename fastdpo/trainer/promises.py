"""What a run's settings promise for later, looked at before anything is trained: its reporters, and its best metric."""

from __future__ import annotations

from collections.abc import Collection

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fastdpo.data.terms import first_line
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import EvalDataset
from fastdpo.trainer.pair_metrics import RANKING_METRICS, ROUTER_METRICS, metric_names

# What Trainer adds to the metrics of every evaluation.
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


def check_reporters(args: DPOConfig) -> None:
    """
    Raises:
        ValueError: ``report_to`` names a program that transformers does not know, or whose package is not installed.
    """
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to is {name!r}; it should be among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        try:
            INTEGRATION_TO_CALLBACK[name]()  # each looks for its package when it is made, and begins nothing
        except (RuntimeError, ImportError) as error:
            why = first_line(str(error) or type(error).__name__)
            raise ValueError(
                f"report_to names {name}, which cannot be used here ({why.rstrip('.')}): install its package, or "
                "leave it out (--report_to none)"
            ) from error


def check_best_metric(args: DPOConfig, eval_dataset: EvalDataset, *, has_router_loss: bool) -> None:
    """
    Args:
        args: the run's.
        eval_dataset: as it is evaluated on.
        has_router_loss: the loss of a mixture of experts' router is part of the loss.

    Raises:
        ValueError: ``metric_for_best_model`` names what no evaluation will have; the message says what it will have.
    """
    asked = args.metric_for_best_model
    if asked is None or args.eval_strategy == "no" or eval_dataset is None:
        return
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    known = [
        f"eval_{name}_{metric}" if name else f"eval_{metric}"
        for name, rows in sets.items()
        for metric in _metrics_of(rows.column_names, has_router_loss)
    ]
    wanted = asked if asked.startswith("eval_") else f"eval_{asked}"
    if wanted not in known:
        raise ValueError(
            f"metric_for_best_model is {asked!r}, and evaluations will have no {wanted}; it should be one of "
            f"{', '.join(known)}"
        )


def _metrics_of(columns: Collection[str], has_router_loss: bool) -> list[str]:
    absent = {*(() if "ranks" in columns else RANKING_METRICS), *(() if has_router_loss else ROUTER_METRICS)}
    return ["loss", *(name for name in metric_names() if name not in absent), *_SPEEDS]
