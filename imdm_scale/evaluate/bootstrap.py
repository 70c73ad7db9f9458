"""Confidence intervals by resampling whole samples (Efron and Tibshirani, "An introduction to the bootstrap", 1993,
section 13.3: the percentile interval).

S samples, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from imdm_scale.evaluate.metrics import SampleScores

REPLICATES = 1000
LEVEL = 0.95
SEED = 0
"""The same for all figures, so that a figure is the same whenever it is computed."""
AT_A_TIME = 1 << 22
"""Counts that are held in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval; both ends None where there is no telling."""

    value: float
    low: float | None
    high: float | None


def resamples(num_samples: int) -> Iterator[np.ndarray]:
    """How often each sample is drawn in each replicate: float64 (some replicates, S) at a time, `REPLICATES` in all.

    The draws depend on S alone, so that figures of the same samples, or of samples of the same numbers at two
    temperatures, are resampled together.
    """
    generator = np.random.default_rng(SEED)
    share_S = np.full(num_samples, 1.0 / num_samples)
    rows = max(1, AT_A_TIME // num_samples)
    for first in range(0, REPLICATES, rows):
        yield generator.multinomial(num_samples, share_S, size=min(rows, REPLICATES - first)).astype(
            np.float64
        )


def mean_replicates(values_S: np.ndarray) -> np.ndarray:
    """The mean in each replicate: (R,)."""
    return np.concatenate([counts_RS @ values_S for counts_RS in resamples(len(values_S))]) / len(values_S)


def perplexity_replicates(scores: SampleScores) -> np.ndarray:
    """The perplexity in each replicate: (R,)."""
    parts = []
    for counts_RS in resamples(len(scores.nll_S)):
        # A replicate may hold no target where hardly any sample has one.
        number = np.maximum(counts_RS @ scores.targets_S, 1)
        parts.append(np.exp(counts_RS @ scores.nll_S / number))
    return np.concatenate(parts)


def interval(value: float, replicates_R: np.ndarray, num_samples: int) -> Interval:
    """The estimate between the quantiles of its replicates; of a single sample nothing can be said."""
    if num_samples < 2 or not np.isfinite(replicates_R).all():
        return Interval(value, None, None)
    low, high = np.quantile(replicates_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(values_S: np.ndarray) -> Interval:
    """Of a mean over samples."""
    return interval(float(values_S.mean()), mean_replicates(values_S), len(values_S))


def perplexity_interval(scores: SampleScores) -> Interval:
    """Of a perplexity.

    Raises:
        ValueError: the samples have no target at all.
    """
    return interval(scores.perplexity, perplexity_replicates(scores), len(scores.nll_S))
