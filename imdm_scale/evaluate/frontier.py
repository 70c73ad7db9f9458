"""Perplexity against entropy over temperatures, and where it passes the data's entropy.

Perplexity alone can be gamed: a lower temperature makes texts likelier and poorer at once. Samplers are therefore
compared at one entropy, that of real text.

P points of a frontier, R replicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imdm_scale.evaluate.bootstrap import Interval, interval, mean_replicates, perplexity_replicates
from imdm_scale.evaluate.metrics import SampleScores


@dataclass(frozen=True)
class FrontierPoint:
    """The texts of one temperature; those of all temperatures have the same numbers."""

    entropy_S: np.ndarray
    """float64, of each sample in nats."""
    scores: SampleScores


def perplexity_at(entropy: float, entropies_P: np.ndarray, perplexities_P: np.ndarray) -> float | None:
    """ln perplexity interpolated linearly between the two points whose entropies enclose `entropy`, then exp.

    Points of the same entropy count as one with their mean ln perplexity. None where `entropy` lies outside the
    points: nothing is extrapolated.
    """
    at_P, of_P = np.unique(entropies_P, return_inverse=True)
    log_P = np.bincount(of_P, weights=np.log(perplexities_P)) / np.bincount(of_P)
    if not at_P[0] <= entropy <= at_P[-1]:
        return None
    return float(np.exp(np.interp(entropy, at_P, log_P)))


def matched_perplexity(points: list[FrontierPoint], entropy: float) -> Interval | None:
    """The perplexity at an entropy, with its interval over samples (the entropy itself is taken as exact).

    The interval is left out where in some replicates the entropy lies outside the frontier.
    """
    value = perplexity_at(
        entropy,
        np.array([point.entropy_S.mean() for point in points]),
        np.array([point.scores.perplexity for point in points]),
    )
    if value is None:
        return None
    entropies_PR = np.stack([mean_replicates(point.entropy_S) for point in points])
    perplexities_PR = np.stack([perplexity_replicates(point.scores) for point in points])
    replicates = [
        perplexity_at(entropy, entropies_P, perplexities_P)
        for entropies_P, perplexities_P in zip(entropies_PR.T, perplexities_PR.T, strict=True)
    ]
    replicates_R = np.array([np.nan if found is None else found for found in replicates])
    return interval(value, replicates_R, len(points[0].entropy_S))
