"""Intervals cover what they should, and are those of the plain definition.

S samples, R replicates.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from imdm_scale.evaluate import bootstrap
from imdm_scale.evaluate.bootstrap import interval, mean_interval, perplexity_interval, resamples
from imdm_scale.evaluate.metrics import SampleScores


def test_replicates_draw_each_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resamples(30)))
    assert whole.shape == (bootstrap.REPLICATES, 30)
    assert (whole.sum(axis=1) == 30).all() and whole.min() == 0
    monkeypatch.setattr(bootstrap, "AT_A_TIME", 100)
    assert (np.concatenate(list(resamples(30))) == whole).all(), "whatever is held in memory at a time"


def test_plain_definition() -> None:
    rng = np.random.default_rng(3)
    scores = SampleScores(rng.gamma(3.0, size=40), rng.integers(1, 9, size=40))
    found = perplexity_interval(scores)
    replicates = []
    for counts_S in np.concatenate(list(resamples(40))).astype(int):
        drawn = np.repeat(np.arange(40), counts_S)
        replicates.append(np.exp(scores.nll_S[drawn].sum() / scores.targets_S[drawn].sum()))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(replicates, [0.025, 0.975])))
    assert found.value == scores.perplexity and found.low < found.value < found.high


def test_coverage() -> None:
    """Of 300 independent sets of 200 samples the interval of a ratio holds the truth as often as it says.

    For samples of this size the percentile interval's own coverage is about .94; the hits of 300 trials at .92 to .97
    leave the bounds below in less than 1e-4 of all cases (binomial), and the seed fixes them.
    """
    rng = np.random.default_rng(4)
    truth = np.exp(3.0 * 2.0)  # nll a target of mean 6, whatever the number of targets
    hits = 0
    for _ in range(300):
        targets_S = rng.integers(5, 15, size=200)
        nll_S = targets_S * rng.gamma(3.0, 2.0, size=200)
        found = perplexity_interval(SampleScores(nll_S, targets_S))
        hits += found.low <= truth <= found.high
    low, high = stats.binom.ppf(1e-4, 300, 0.92), stats.binom.ppf(1 - 1e-4, 300, 0.97)
    assert low <= hits <= high


def test_nothing_is_said_of_one_sample() -> None:
    found = mean_interval(np.array([2.5]))
    assert (found.value, found.low, found.high) == (2.5, None, None)
    assert interval(1.0, np.array([1.0, np.nan]), 5).low is None


def test_no_target() -> None:
    with pytest.raises(ValueError, match="no token"):
        perplexity_interval(SampleScores(np.zeros(3), np.zeros(3, dtype=np.int64)))
