"""An evaluation from models and rows to figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset

from fastdpo.data.columns import may_have_images
from fastdpo.data.summary import DataSummary
from fastdpo.data.terms import DataError
from fastdpo.errors import InputError
from fastdpo.evaluation.completions import JudgedPrompts, choose_prompts, complete_prompts
from fastdpo.evaluation.held_out import HeldOut, load_tokenizers, read_held_out
from fastdpo.evaluation.judge import Contest, JudgeFigures, Verdicts, judge_contests, judge_figures
from fastdpo.evaluation.judge_answers import JudgeAnswers
from fastdpo.evaluation.judge_client import JudgeClient, JudgeError
from fastdpo.evaluation.loading import Weights, in_turn, weights_of
from fastdpo.evaluation.results import Figures, figures_of
from fastdpo.evaluation.scores import Evaluated, PairPlaces, PairScores
from fastdpo.evaluation.scoring import ModelScorer
from fastdpo.evaluation.slices import slices_of
from fastdpo.evaluation.statistics import Resampling
from fastdpo.model.generation import Drawing, Text
from fastdpo.trainer.config import DPOConfig


@dataclass(frozen=True)
class Judging:
    """How completions are judged.

    Attributes:
        client: who is asked.
        answers: what was answered before.
        prompts: how many prompts, at most.
        workers: questions at a time.
        drawing: how completions are drawn.
    """

    client: JudgeClient
    answers: JudgeAnswers
    prompts: int = 100
    workers: int = 4
    drawing: Drawing = field(default_factory=Drawing)


@dataclass(frozen=True)
class JudgedContest:
    """Two sides' answers to the same prompts, what was said of them, and what that comes to."""

    contests: list[Contest]
    verdicts: Verdicts
    figures: JudgeFigures


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        models: with their scores of the pairs.
        places: of the pairs.
        figures: what the scores come to.
        judged: what a judge said, two sides at a time; empty without one.
        summaries: label -> what became of the rows; of models that read alike, of the first.
        layouts: how batches were laid out, model by model, in words.
        notes: what a reader should know.
        judge_stopped: why contests are missing from ``judged``; empty where none are.
    """

    models: list[Evaluated]
    places: PairPlaces
    figures: Figures
    judged: list[JudgedContest]
    summaries: dict[str, DataSummary]
    layouts: dict[str, str]
    notes: list[str]
    judge_stopped: str = ""


def evaluate(
    dataset: Dataset,
    models: Sequence[str],
    reference: str | None,
    args: DPOConfig,
    *,
    columns: Sequence[str] = (),
    how: Resampling | None = None,
    judging: Judging | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Score ``dataset`` by each of ``models``, and compare them.

    Args:
        dataset: rows as :func:`fastdpo.data.load_preferences` gives them.
        models: names or paths of models and adapters; an adapter's base is loaded once for all of its adapters.
        reference: of the rewards. By default the base of an adapter, and none for other models.
        args: how rows are tokenised and cut, how they are laid out, and where models run; ``beta``, too.
        columns: whose values make parts of their own.
        how: how intervals are made.
        judging: has completions judged, too: of each two models, or of a model alone with the data's chosen answers. A
            judge that does not answer leaves the rest as it is.
        say: told what is done next.

    Raises:
        fastdpo.data.terms.DataError: the rows cannot be used.
        ValueError, OSError, NotImplementedError: a model cannot be used.
        InputError: a model's log-probabilities are no numbers.
    """
    how = how or Resampling()
    for column in columns:
        if column not in dataset.column_names:
            raise DataError(
                f"there is no column {column!r} to make parts by; there are {', '.join(dataset.column_names)}."
            )
    images = may_have_images(dataset)
    weights = {name: weights_of(name, args) for name in models}
    if len(set(weights.values())) < len(models):
        raise ValueError(f"a model is named twice among {', '.join(models)}; it would be compared with itself")
    references = {name: _reference_of(name, weights[name], reference, args) for name in models}
    tokenizers = load_tokenizers(models, args, images=images)
    distinct = list({id(each): each for each in tokenizers.values()}.values())
    read = {id(each): read_held_out(dataset, each, args) for each in distinct}
    held_out = {name: read[id(tokenizers[name])] for name in models}
    if len(distinct) > 1 and any(each.are_groups for each in read.values()):
        raise DataError(
            "the models have different tokenizers, and rows of several answers are compared by their tokens; evaluate "
            "each model by itself, or make pairs of the rows."
        )
    prompts = None
    if judging is not None:
        most = judging.drawing.max_new_tokens
        prompts = choose_prompts(dataset, list(read.values()), judging.prompts, most)
    if prompts is not None and not prompts.rows:
        raise DataError("no prompt can be completed for the judge: all have images.")
    found = _score(models, weights, references, held_out, args, prompts, judging, images=images, say=say)
    # As they were asked for, where they were.
    called = {weights_of(reference, args): reference} if reference else {}
    called |= {of: name for name, of in weights.items()}
    labels = {name: called.get(of, of.source) if of else "" for name, of in references.items()}
    return _put_together(
        dataset, models, found, held_out, references, labels, args, columns, how, prompts, judging, say
    )


@dataclass
class _Found:
    """What was scored, by weights and by what the rows were tokenised with; completions and layouts, by model.

    A reference without embeddings for all tokens of the rows has no scores.
    """

    scores: dict[tuple[Weights, int], PairScores] = field(default_factory=dict)
    texts: dict[Weights, list[Text]] = field(default_factory=dict)
    layouts: dict[Weights, str] = field(default_factory=dict)


def _reference_of(name: str, weights: Weights, reference: str | None, args: DPOConfig) -> Weights | None:
    """What its rewards are measured against; None where it is the reference itself, or there is none."""
    if reference is not None:
        found = weights_of(reference, args)
        return None if found == weights else found
    return None if weights.adapter is None else Weights(weights.base)


def _score(
    models: Sequence[str],
    weights: dict[str, Weights],
    references: dict[str, Weights | None],
    held_out: dict[str, HeldOut],
    args: DPOConfig,
    prompts: JudgedPrompts | None,
    judging: Judging | None,
    *,
    images: bool,
    say: Callable[[str], None],
) -> _Found:
    # A reference scores what its models read, as it does in training.
    jobs: dict[Weights, dict[int, HeldOut]] = {}
    for name in models:
        for each in (weights[name], references[name]):
            if each is not None:
                jobs.setdefault(each, {})[id(held_out[name])] = held_out[name]
    own = {weights[name]: held_out[name] for name in models}
    scorer, found = ModelScorer(args), _Found()
    for each, model in in_turn(list(jobs), args, images=images):
        for key, rows in jobs[each].items():
            try:
                scores = scorer.score(model, rows, _short(each.source))
            except DataError:  # tokens that it has no embeddings for, as the base of an adapter that brings some
                if own.get(each) is rows:
                    raise
                continue
            _check_finite(scores, rows, each.source)
            found.scores[each, key] = scores
            found.layouts[each] = scorer.layout
        if judging is not None and prompts is not None and each in own:
            say(f"Completing {len(prompts.rows)} prompts by {each.source} …")
            found.texts[each] = complete_prompts(model, own[each], prompts, judging.drawing)
    return found


def _short(source: str) -> str:
    return source.rstrip("/").split("/")[-1]


def _check_finite(scores: PairScores, rows: HeldOut, source: str) -> None:
    bad = np.flatnonzero(~scores.is_finite())
    if len(bad):
        raise InputError(
            f"{source} gives log-probabilities that are no numbers to {len(bad)} of {len(rows.pairs())} pairs (first: "
            f"row {rows.pairs().rows[bad[0]]}). Load it in float32 (--dtype float32, --no_bf16); if that is so there "
            "too, the model is damaged"
        )


def _put_together(
    dataset: Dataset,
    models: Sequence[str],
    found: _Found,
    held_out: dict[str, HeldOut],
    references: dict[str, Weights | None],
    labels: dict[str, str],
    args: DPOConfig,
    columns: Sequence[str],
    how: Resampling,
    prompts: JudgedPrompts | None,
    judging: Judging | None,
    say: Callable[[str], None],
) -> Evaluation:
    notes: list[str] = []
    if args.average_log_prob or args.ld_alpha is not None:
        option = "--average_log_prob" if args.average_log_prob else f"--ld_alpha {args.ld_alpha:g}"
        notes.append(
            f"The training's loss had {option}; all figures here are of sums over all tokens, but for those a token, "
            "and so are rewards."
        )
    places, shared = _in_common(models, held_out, notes)
    evaluated = []
    for name in models:
        reference, key = references[name], id(held_out[name])
        if reference is not None and (reference, key) not in found.scores:
            notes.append(
                f"{name} has no rewards: its reference, {labels[name]}, has no embeddings for some tokens of the rows. "
                "(Those that a training's reference had for them are not saved with an adapter.)"
            )
            reference = None
        evaluated.append(
            Evaluated(
                name,
                name,
                found.scores[weights_of(name, args), key].at(shared[name]),
                None if reference is None else found.scores[reference, key].at(shared[name]),
                "" if reference is None else labels[name],
            )
        )
    first = evaluated[0].scores
    values: dict[str, Sequence[Any]] = {name: dataset.select(places.rows)[name] for name in columns}
    slices = slices_of(first.chosen_tokens, first.rejected_tokens, values)
    say(f"{len(places)} pairs, {len(np.unique(places.clusters))} prompts: intervals and tests …")
    figures = figures_of(evaluated, places, slices, args.beta, how)
    judged, stopped = [], ""
    if judging is not None and prompts is not None:
        texts = {name: found.texts[weights_of(name, args)] for name in models}
        try:
            for contest in _judge(models, texts, prompts, judging, how, show_progress=not args.disable_tqdm):
                judged.append(contest)
        except JudgeError as error:
            stopped = str(error)
            notes.append(f"Judged in part, or not at all: {stopped}.")
    summaries = {name: held_out[name].summary for name in models}
    seen: dict[int, str] = {}
    summaries = {name: each for name, each in summaries.items() if seen.setdefault(id(each), name) == name}
    layouts = {weights.source: words for weights, words in found.layouts.items()}
    return Evaluation(evaluated, places, figures, judged, summaries, layouts, notes, stopped)


def _in_common(
    models: Sequence[str], held_out: dict[str, HeldOut], notes: list[str]
) -> tuple[PairPlaces, dict[str, np.ndarray]]:
    """The pairs that every model scored, and which of each model's these are."""
    own = {name: held_out[name].pairs() for name in models}
    places = own[models[0]]
    if len({id(held_out[name]) for name in models}) == 1:
        return places, {name: np.arange(len(places)) for name in models}
    rows = places.rows
    for name in models[1:]:
        rows = rows[np.isin(rows, own[name].rows)]
    if not len(rows):
        raise DataError("no row is kept by all models' tokenizers and templates; evaluate each by itself.")
    shared = {name: np.searchsorted(each.rows, rows) for name, each in own.items()}
    notes.append(
        f"The models have different tokenizers or chat templates. All figures are of the {len(rows)} pairs that all of "
        "them keep; log-probabilities per token are of different tokens."
    )
    return PairPlaces(rows, places.clusters[shared[models[0]]]), shared


def _judge(
    models: Sequence[str],
    texts: dict[str, list[Text]],
    prompts: JudgedPrompts,
    judging: Judging,
    how: Resampling,
    *,
    show_progress: bool,
) -> Iterator[JudgedContest]:
    """Each two sides, as they are judged; raises JudgeError."""
    sides = [(name, texts[name]) for name in models]
    if len(sides) == 1:
        sides.append(("chosen answers of the data", prompts.chosen))
    for (first, ours), (second, theirs) in combinations(sides, 2):
        contests = [
            Contest(prompt, a.text.strip(), b.text.strip(), a.tokens, b.tokens, not a.ended, not b.ended, row)
            for row, prompt, a, b in zip(prompts.rows, prompts.texts, ours, theirs, strict=True)
        ]
        verdicts = judge_contests(
            contests,
            judging.client,
            judging.answers,
            workers=judging.workers,
            label=f"Judging {_short(first)} and {_short(second)}",
            show_progress=show_progress,
        )
        yield JudgedContest(contests, verdicts, judge_figures((first, second), contests, verdicts, how))
