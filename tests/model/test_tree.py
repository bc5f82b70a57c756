from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_trees import texts

from fastdpo.model.segments import Segments
from fastdpo.model.tree import MASKED_ON_CPU, Prefixes, Tree, in_a_row, side_by_side

# Sequences that begin alike: of few tokens, or one another's beginning.
SEQUENCES = st.lists(st.builds(lambda a, b: a + b, texts(min_size=1), texts()), min_size=1, max_size=9)


def arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int64) for ids in sequences]


def tokens_at(tree: Tree, path: tuple[tuple[int, int], ...]) -> list[int]:
    return [i for begin, end in path for i in range(begin, end)]


def look(tree: Tree, sequences: list[list[int]]) -> None:
    """Sequences are where their paths say, and see what they should."""
    segments = Segments(tree.segments)
    assert segments.length == len(tree.ids) == len(tree.positions)
    for ids, path in zip(sequences, tree.paths, strict=True):
        here = tokens_at(tree, path)
        assert tree.ids[here].tolist() == ids
        assert tree.positions[here].tolist() == list(range(len(ids)))
        owner = next(s for s in tree.segments if s.begin <= here[-1] < s.end)
        assert tokens_at(tree, (*owner.ancestors, (owner.begin, owner.end)))[: len(here)] == here


def beginnings(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}


@given(SEQUENCES)
def test_every_beginning_stands_once(sequences):
    tree = Prefixes(arrays(sequences), least=1).tree()
    look(tree, sequences)
    assert len(tree.ids) == len(beginnings(sequences))


@given(SEQUENCES, st.integers(1, 6))
def test_few_tokens_are_not_shared(sequences, least):
    prefixes = Prefixes(arrays(sequences), least)
    tree = prefixes.tree()
    look(tree, sequences)
    assert len(beginnings(sequences)) <= len(tree.ids)
    depths = [segment.depth for segment in tree.segments]
    assert all(depth == 0 or depth >= least for depth in depths)
    # No branch lies less than that below another one on its way.
    for segment in tree.segments:
        cuts = {
            other.depth for other in tree.segments if other.ancestors[: len(segment.ancestors)] == segment.ancestors
        }
        assert all(abs(a - b) >= least for a in cuts for b in cuts if a != b) or least == 1
    assert prefixes.tokens(range(len(sequences))) == len(tree.ids)


@given(SEQUENCES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_tokens_of_some_are_those_of_their_own_tree(sequences, least, random):
    members = sorted(random.sample(range(len(sequences)), random.randint(1, len(sequences))))
    own = Prefixes(arrays([sequences[i] for i in members]), least).tree()
    prefixes = Prefixes(arrays(sequences), least)
    assert prefixes.tokens(members) == len(own.ids)
    families = prefixes.families()
    for i in members:
        for j in members:
            if families[i] != families[j]:
                apart = sum(prefixes.tokens([k]) for k in (i, j))
                hosted = (
                    sequences[i][: len(sequences[j])] == sequences[j]
                    or sequences[j][: len(sequences[i])] == sequences[i]
                )
                assert hosted or prefixes.tokens([i, j]) == apart


def test_the_longest_lies_as_it_is():
    sequences = [[1, 2, 3, 9], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [1, 8], [5]]
    tree = Prefixes(arrays(sequences), least=1).tree()
    assert tree.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 8, 5]
    assert [tuple(s) for s in tree.segments] == [
        (0, 6, ()),
        (6, 7, ((0, 4),)),
        (7, 8, ((0, 3),)),
        (8, 9, ((0, 1),)),
        (9, 10, ()),
    ]
    assert tree.paths[3] == ((0, 1), (8, 9))


@pytest.mark.parametrize(("prompt", "is_shared"), [(16, False), (100, True)])
def test_few_tokens_before_long_answers_are_not_shared_where_masked_scores_cost(prompt, is_shared):
    """As measured, in a layer of width 512: a branch of 1,000 tokens computes scores for nothing, 70 tokens' worth."""
    context = list(range(100, 100 + prompt))
    sequences = [context + [1] * 1000, context + [2] * 1000]
    for masked in (0.0, MASKED_ON_CPU / 512):
        tree = Prefixes(arrays(sequences), masked=masked).tree()
        look(tree, sequences)
        saved = prompt if is_shared or not masked else 0
        assert len(tree.ids) == 2 * (1000 + prompt) - saved
    # Where another branch is there already, a longer one would compute more for nothing.
    sequences += [context + [1] * 20 + [3] * 1000]
    tree = Prefixes(arrays(sequences), masked=MASKED_ON_CPU / 512).tree()
    look(tree, sequences)
    assert [segment.depth for segment in tree.segments] == ([0, prompt + 20, prompt] if is_shared else [0, 0, 0])


def test_thousands_of_branches_on_branches():
    """No depth of the tree is too much, and none takes long."""
    sequences = [[1] * i + [2] * 3 for i in range(1, 400)]
    tree = Prefixes(arrays(sequences), least=1).tree()
    look(tree, sequences)


@given(st.lists(SEQUENCES, min_size=1, max_size=3))
def test_trees_one_after_another(groups):
    look(in_a_row([Prefixes(arrays(group), least=1).tree() for group in groups]), sum(groups, []))
    everything = sum(groups, [])
    alone = side_by_side(arrays(everything))
    look(alone, everything)
    assert len(alone.ids) == sum(map(len, everything))


@pytest.mark.parametrize("least", [1, 5])
def test_equal_ones_and_beginnings_of_others_stand_once(least):
    sequences = [[1, 2], [1, 2, 3], [1, 2], [1, 2, 3], [1]]
    tree = Prefixes(arrays(sequences), least).tree()
    assert tree.ids.tolist() == [1, 2, 3]
    look(tree, sequences)
