"""Rows of several answers to a prompt → token ids, each answer once, and the pairs that are left of them.

An answer goes the way of a pair's chosen one, beside itself as the rejected one: what renders, tokenises and looks at
pairs does so with it, and what is said of it is of it alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.comparisons import NO_WEIGHT, Choice, Compared, compared, of_pair, ranks_or_order
from fastdpo.data.encode import Ids
from fastdpo.data.rows import common_prefix_length, is_chat
from fastdpo.data.terms import DataError, type_name
from fastdpo.data.tokens import RowTokenizer, Tokens

EQUAL = "its two answers are equal"
# What is said of a pair of an answer with itself, and means nothing.
_OF_ITSELF = ("identical",)


@dataclass
class GroupTokens:
    """A group's ids and fate.

    Attributes:
        prompt: ids that all answers follow.
        completions: ids of the answers that are in a pair.
        masks: 1 on the tokens of each that count; empty where all do.
        pairs: places of chosen and rejected ones.
        weights: of the pairs; empty where all count the same.
        ranks: of the answers, the best first from 0; empty where two are as good, or nobody said.
        left_out: why pairs were not made or are no more, a reason each.
        drop: why the row is dropped; empty for no reason.
        warn: reasons to look at it.
    """

    prompt: Ids = field(default_factory=list)
    completions: list[Ids] = field(default_factory=list)
    masks: list[Ids] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    drop: str = ""
    warn: list[str] = field(default_factory=list)


def tokenize_groups(
    tokenizer: RowTokenizer, rows: list[dict[str, Any]], numbers: list[int], choice: Choice
) -> list[GroupTokens]:
    """Rows by name of column, with their numbers in the dataset.

    A row without ``completions`` is a pair: a group of two.

    Raises:
        DataError: a row is malformed, or the chat template refuses it.
    """
    found = [GroupTokens() for _ in rows]
    waiting: list[tuple[GroupTokens, Compared, dict[int, int]]] = []  # and which answer is which row of those below
    answers: list[dict[str, Any]] = []
    of: list[int] = []
    for group, row, number in zip(found, rows, numbers, strict=True):
        read = _read(row, choice, f"row {number}")
        if isinstance(read, str):
            group.drop = read
            continue
        completions, said = read
        group.left_out, group.warn = said.left_out, list(said.doubts)
        if not said.pairs:
            group.drop = "no_weight" if NO_WEIGHT in said.left_out else "all_ties" if said.left_out else "no_pairs"
            continue
        places = {}
        for i in sorted({i for pair in said.pairs for i in pair}):
            name = f"completions[{i}]" if row.get("completions") is not None else ("chosen", "rejected")[i]
            if completions[i] is not None and completions[i] == completions[i]:  # null, or NaN for it, has a reason
                is_chat(completions[i], f"row {number}, {name}")  # which would call it the chosen one later
            places[i] = len(answers)
            answers.append({**row, "chosen": completions[i], "rejected": completions[i]})
            of.append(number)
        waiting.append((group, said, places))
    tokens = tokenizer.tokenize(answers, of)
    for group, said, places in waiting:
        _fill(group, said, {i: tokens[place] for i, place in places.items()})
    return found


def _read(row: dict[str, Any], choice: Choice, where: str) -> tuple[list[Any], Compared] | str:
    completions = row.get("completions")
    if completions is None:
        return [row.get("chosen"), row.get("rejected")], of_pair(row, where)
    if not isinstance(completions, list):
        raise DataError(f"{where}, completions: needed a list of answers, found {type_name(completions)}.")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        raise DataError(
            f"{where}: it has 'completions' beside 'chosen' and 'rejected', and is a group or a pair; remove the "
            "columns of the other."
        )
    if len(completions) < 2:
        return "one_answer"
    return completions, compared(row, len(completions), choice, where)


def _fill(group: GroupTokens, said: Compared, tokens: dict[int, Tokens]) -> None:
    dropped = {i: each.drop for i, each in tokens.items() if each.drop}
    kept = {i: each for i, each in tokens.items() if not each.drop}
    for each in kept.values():
        group.warn += [reason for reason in each.warn if reason not in (*_OF_ITSELF, *group.warn)]
    # Answers that are equal are one; the first that is in a pair stands for all.
    first: dict[tuple[Any, ...], int] = {}
    stands_for: dict[int, int] = {}
    for i, each in kept.items():
        stands_for[i] = first.setdefault((tuple(each.prompt + each.chosen), tuple(each.chosen_mask)), i)
    weights = [1.0] * len(said.pairs) if said.weights is None else said.weights
    pairs = []
    for (chosen, rejected), weight in zip(said.pairs, weights, strict=True):
        lost = dropped.get(chosen) or dropped.get(rejected)
        if lost:
            group.left_out.append(lost)
        elif stands_for[chosen] == stands_for[rejected]:
            group.left_out.append(EQUAL)
        else:
            pairs.append((stands_for[chosen], stands_for[rejected], weight))
    if not pairs:
        group.drop = Counter(dropped.values()).most_common(1)[0][0] if dropped else "equal_answers"
        group.warn = []
        return
    answers = sorted({i for chosen, rejected, _ in pairs for i in (chosen, rejected)})
    place = {i: number for number, i in enumerate(answers)}
    group.pairs = [(place[chosen], place[rejected]) for chosen, rejected, _ in pairs]
    lay_out(group, [kept[i] for i in answers])
    group.weights = [] if said.weights is None else [weight for *_, weight in pairs]
    group.ranks = ranks_or_order(said.scores, answers, group.pairs)


def lay_out(group: GroupTokens, answers: list[Tokens]) -> None:
    """Fill in the ids and masks: the group's prompt is what the prompts of all answers begin with.

    An answer that merges with the end of the prompt has a shorter one than the others, to which those tokens are
    context. A pair by itself scores them on both of its sides, so an answer all of whose pairs would be scored from
    the same token is scored from it; any other one from where its own tokens leave the prompt: it has one mask.
    """
    prompts = [each.prompt for each in answers]
    longest = max(prompts, key=len)
    group.prompt = longest[: min(common_prefix_length(longest, prompt) for prompt in prompts)]
    ends = [len(prompt) for prompt in prompts]
    begins: list[set[int]] = [set() for _ in answers]
    if all(longest[:end] == prompt for prompt, end in zip(prompts, ends, strict=True)):
        for pair in group.pairs:
            for i in pair:
                begins[i].add(min(ends[j] for j in pair))
    for each, end, found in zip(answers, ends, begins, strict=True):
        begin = found.pop() if len(found) == 1 else end
        whole = each.prompt + each.chosen
        mask = [0] * end + each.chosen_mask if each.chosen_mask else [0] * begin + [1] * (len(whole) - begin)
        mask = mask[len(group.prompt) :]
        group.completions.append(whole[len(group.prompt) :])
        group.masks.append([] if all(mask) and not each.chosen_mask else mask)
