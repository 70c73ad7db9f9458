"""Distinct-n and self-BLEU on examples computed by hand, and against dictionaries and loops.

S samples, L positions.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.evaluate.diversity import distinct_n, self_bleu

SAMPLES = st.tuples(st.integers(2, 5), st.integers(1, 7), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, shape[2]), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    ).map(np.array)
)


def grams_of(row: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def bleu_by_dictionaries(ids_SL: np.ndarray) -> float:
    rows = ids_SL.tolist()
    length, orders = ids_SL.shape[1], range(1, min(4, ids_SL.shape[1]) + 1)
    total = 0.0
    for i, row in enumerate(rows):
        logs = []
        for n in orders:
            most: Counter[tuple[int, ...]] = Counter()
            for j, other in enumerate(rows):
                if j != i:
                    most |= grams_of(other, n)
            matches = sum((grams_of(row, n) & most).values())
            logs.append(math.log(max(matches, 0.1) / (length - n + 1)))
        total += math.exp(sum(logs) / len(logs))
    return total / len(rows)


def test_distinct_by_hand() -> None:
    ids_SL = np.array([[1, 2, 1, 2], [1, 2, 3, 3]])
    assert distinct_n(ids_SL, 1) == 3 / 8
    assert distinct_n(ids_SL, 2) == 4 / 6, "12 21 12 and 12 23 33"
    assert distinct_n(ids_SL, 4) == 1
    with pytest.raises(ValueError, match="no 5-grams"):
        distinct_n(ids_SL, 5)


def test_self_bleu_by_hand() -> None:
    """The first sample has 3 of 4 unigrams in the other, 1 of 3 bigrams, none of 2 trigrams, nor the 4-gram."""
    ids_SL = np.array([[1, 2, 3, 4], [1, 2, 4, 5]])
    one = (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert self_bleu(ids_SL) == pytest.approx(one), "and so has the second"


def test_a_repeated_token_matches_as_often_as_it_stands_there() -> None:
    ids_SL = np.array([[7, 7, 7], [7, 8, 9]])
    first = (1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 3)
    assert self_bleu(ids_SL) == pytest.approx(first), "the second likewise has one unigram"


@given(SAMPLES)
def test_self_bleu_is_that_of_dictionaries(ids_SL: np.ndarray) -> None:
    assert self_bleu(ids_SL) == pytest.approx(bleu_by_dictionaries(ids_SL))


@given(SAMPLES, st.permutations(range(5)))
def test_names_of_tokens_and_order_of_samples_mean_nothing(ids_SL: np.ndarray, names: list[int]) -> None:
    renamed = 1000 * np.array(names)[ids_SL][::-1]
    assert self_bleu(renamed) == pytest.approx(self_bleu(ids_SL))
    assert distinct_n(renamed, 1) == distinct_n(ids_SL, 1)


@given(SAMPLES)
def test_copies_are_alike(ids_SL: np.ndarray) -> None:
    assert self_bleu(ids_SL[:1].repeat(3, axis=0)) == pytest.approx(1)
    assert 0 < self_bleu(ids_SL) <= 1 + 1e-12


def test_ids_of_large_vocabularies() -> None:
    ids_SL = np.array([[2**31, 2**31 + 1, 5, 6, 7], [2**31, 2**31 + 1, 5, 6, 8]])
    assert distinct_n(ids_SL, 4) == 3 / 4


def test_one_sample_has_no_others() -> None:
    with pytest.raises(ValueError, match="only one"):
        self_bleu(np.array([[1, 2]]))
