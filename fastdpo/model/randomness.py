"""What makes a model's forward random in training: dropout, dropped layers, noise on a router."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastdpo.model.language_model import cannot_run, described
from fastdpo.model.model_check import made_up_tokens, score_tokens
from fastdpo.model.scoring import Scorer

# Attributes that layers keep a probability or a width of noise in.
_NAMES = ("dropout", "pdrop", "layerdrop", "drop_path", "jitter")
# In nats: more than the order of a sum changes.
_MUCH = 0.01


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout in ``model`` to 0: the modules', and what layers keep as numbers; so too a router's jitter."""
    for module, name in _sources(model):
        setattr(module, name, 0.0)


@contextlib.contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """Every dropout and every jitter is 0, until the block ends."""
    before = [(module, name, getattr(module, name)) for module, name in _sources(model)]
    disable_dropout(model)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def has_dropout(model: nn.Module) -> bool:
    """Whether there is a dropout in ``model``, or a jitter, that is not 0."""
    return any(getattr(module, name) > 0 for module, name in _sources(model))


def _sources(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where ``model`` keeps the probabilities of its dropouts, and the width of its jitter: (module, attribute)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(part in name for part in _NAMES):
                yield module, name


def randomness_left(scorer: Scorer, device: torch.device) -> str | None:
    """What two equal forwards in training mode differ by, in words; None where they do not.

    Random number generators are left as they were.

    Args:
        scorer: a model whose dropout is off.
        device: where it runs.

    Raises:
        NotImplementedError: the model cannot be run in training mode; the message names it.
    """
    name = described(scorer.lm)
    ids = made_up_tokens(scorer, device)
    was_training = scorer.root.training
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            differences = {}
            for training in (True, False):
                scorer.root.train(training)
                first, second = (score_tokens(scorer, ids) for _ in range(2))
                differences[training] = float((first - second).abs().max())
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:
        raise cannot_run(scorer.lm, "in training mode", error) from error
    finally:
        scorer.root.train(was_training)
    by = differences[True]
    # Sums whose order is not fixed differ in evaluation as well, and by as little.
    if not by > 4 * differences[False] and not by > _MUCH:
        return None
    settings = [f"{key}={value}" for key, value in _settings(scorer.lm.config.get_text_config().to_dict())]
    where = "also in evaluation" if differences[False] > _MUCH else "in training mode, although dropout is off"
    return (
        f"{name} is random {where}: log-probabilities of the same tokens differ by {by:.2g} nats from one forward to "
        "the next. Rewards have this noise in them, and the first loss is not what it should be"
        + (f". Its configuration has {', '.join(settings)}: set these to 0" if settings else "")
    )


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Entries of a configuration that name a source of randomness, and are not 0."""
    for name, value in config.items():
        if isinstance(value, float) and value > 0 and any(part in name for part in _NAMES):
            yield name, value
