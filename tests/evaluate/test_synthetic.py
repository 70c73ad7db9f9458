"""Measures of synthetic samples on samples whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.data.synthetic import AllEqual, HiddenMarkov
from imdm_scale.evaluate.synthetic import (
    factorisation_error,
    likely_share,
    pair_distance,
    possible_share,
    share_of,
    token_entropy,
    total_correlation,
)

TASK = AllEqual(vocab_size=5, length=3)
HMM = HiddenMarkov(vocab_size=3, length=4, num_states=2, concentration=0.5, law_seed=3)


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_intervals_are_wilsons(hits_of: tuple[int, int]) -> None:
    share = share_of(*hits_of)
    wanted = stats.binomtest(*hits_of).proportion_ci(method="wilson")
    assert share.value == hits_of[0] / hits_of[1]
    assert (share.low, share.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_perfect_samples() -> None:
    ids_SL = np.repeat(np.arange(5)[:, None], 3, axis=1).repeat(40, axis=0)
    assert possible_share(ids_SL, TASK).value == 1
    assert token_entropy(ids_SL, 5) == pytest.approx(np.log(5))
    assert total_correlation(ids_SL) == pytest.approx(2 * np.log(5)) == TASK.total_correlation().value
    assert factorisation_error(ids_SL, TASK) == pytest.approx(0, abs=1e-12)


def test_independent_positions() -> None:
    """Every sequence once: no correlation, and a fifth of a fifth of them are all equal."""
    ids_SL = np.indices((5, 5, 5)).reshape(3, -1).T
    assert possible_share(ids_SL, TASK).value == 1 / 25
    assert total_correlation(ids_SL) == pytest.approx(0, abs=1e-12)
    assert factorisation_error(ids_SL, TASK) == np.inf
    assert possible_share(np.array([[0, 0, 6], [6, 6, 6]]), TASK).value == 0, "foreign ids"


def test_a_law_that_allows_everything() -> None:
    """Twice the divergence times S is chi-square with 80 degrees of freedom: beyond its 1e-6 quantiles it is no chance.

    The seed fixes the samples.
    """
    ids_SL = HMM.samples(seed=2, first=0, count=40_000)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], 80) / (2 * len(ids_SL))
    assert low < factorisation_error(ids_SL, HMM) < high
    shuffled = np.stack([np.roll(ids_S, 7 * i) for i, ids_S in enumerate(ids_SL.T)], axis=1)
    joint = np.einsum("a,b,c,d->abcd", *[HMM.token_probs()] * 4).ravel()
    reverse = (joint * (np.log(joint) - np.log(HMM.all_probs()))).sum()
    # Both plug-ins are high by about 80 / 2S, and vary by about sqrt(2 KL / S): six of these.
    for estimate, exact in (
        (factorisation_error(shuffled, HMM), reverse),
        (total_correlation(ids_SL), HMM.total_correlation().value),
    ):
        assert abs(estimate - 80 / (2 * len(ids_SL)) - exact) < 6 * np.sqrt(2 * exact / len(ids_SL))


def test_too_many_sequences() -> None:
    large = AllEqual(vocab_size=50, length=8)
    assert factorisation_error(large.samples(0, 0, 10), large) is None


@pytest.mark.parametrize("task", [TASK, HMM])
def test_pairs_of_the_law(task: AllEqual | HiddenMarkov) -> None:
    """The pair law is the marginal of the joint, and the task's own samples are near it."""
    joint = task.all_probs()
    assert joint is not None
    shape = (task.vocab_size,) * task.length
    for i in range(task.length - 1):
        others = tuple(j for j in range(task.length) if j not in (i, i + 1))
        np.testing.assert_allclose(joint.reshape(shape).sum(others), task.pair_probs(), atol=1e-12)
    own = task.samples(0, 0, 20_000)
    assert pair_distance(own, task) < 0.02


def test_pairs_of_independent_positions_and_of_foreign_ids() -> None:
    ids_SL = np.random.default_rng(0).integers(0, 5, (50_000, 3))
    assert pair_distance(ids_SL, TASK) == pytest.approx(0.8, abs=0.01)
    assert pair_distance(np.full((10, 3), 7), TASK) == 1
    assert pair_distance(np.zeros((10, 3), dtype=np.int64), TASK) == pytest.approx(0.8)


def test_likely_samples() -> None:
    """The law's own share is .99 (standard deviation .0007), and that of a law without ties .99 at most."""
    own = HMM.samples(5, 0, 20_000)
    assert 0.986 < likely_share(own, HMM).value <= 1
    assert likely_share(np.full((10, 4), 9), HMM).value == 0
    equal = np.random.default_rng(0).integers(0, 5, (1000, 3))
    assert likely_share(equal, TASK).value == possible_share(equal, TASK).value
    assert likely_share(TASK.samples(0, 0, 100), TASK).value == 1
