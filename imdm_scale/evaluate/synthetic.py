"""How far samples of a synthetic task are from its law.

Shapes: S samples, L length (positions), V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from imdm_scale.data.synthetic import MONTE_CARLO_FIRST, MONTE_CARLO_SAMPLES, SyntheticTask, entropy

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Share:
    """A share of the samples, with its 95% confidence interval."""

    value: float
    low: float
    high: float


def share_of(hits: int, count: int) -> Share:
    """`hits` of `count`, with Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which holds near 0 and 1 too."""
    centre = (hits + Z_95**2 / 2) / (count + Z_95**2)
    half = Z_95 / (count + Z_95**2) * math.sqrt(hits * (count - hits) / count + Z_95**2 / 4)
    return Share(hits / count, max(0.0, centre - half), min(1.0, centre + half))


def possible_share(ids_SL: np.ndarray, task: SyntheticTask) -> Share:
    """Share of the samples that the task's law allows; for `AllEqual` the rate of equal positions."""
    return share_of(int(np.isfinite(task.log_probs(ids_SL)).sum()), len(ids_SL))


def likely_share(ids_SL: np.ndarray, task: SyntheticTask) -> Share:
    """Share of the samples that are as likely under the task's law as all but the least likely 1% of its own.

    The law itself has .99. Where every possible sequence is equally likely this is `possible_share`.
    """
    own_S = task.log_probs(task.samples(0, MONTE_CARLO_FIRST, MONTE_CARLO_SAMPLES))
    return share_of(int((task.log_probs(ids_SL) >= np.quantile(own_S, 0.01)).sum()), len(ids_SL))


def pair_distance(ids_SL: np.ndarray, task: SyntheticTask) -> float:
    """Total variation between the samples' law of two adjacent tokens and the task's, in [0, 1].

    All adjacent pairs are pooled, since the tasks are stationary. Independent positions of the right marginals show
    what their independence costs: for `AllEqual` 1 - 1 / V. The plug-in is high by chance: compare with that of as
    many samples of the task.
    """
    size = task.vocab_size
    first_P, second_P = ids_SL[:, :-1].ravel(), ids_SL[:, 1:].ravel()
    known_P = (np.maximum(first_P, second_P) < size) & (np.minimum(first_P, second_P) >= 0)
    counts = np.bincount(first_P[known_P] * size + second_P[known_P], minlength=size * size)
    frequencies_VV = (counts / len(first_P)).reshape(size, size)
    # Foreign ids lie where the law has nothing: their whole share is a difference.
    return float((np.abs(frequencies_VV - task.pair_probs()).sum() + 1 - known_P.mean()) / 2)


def token_entropy(ids_SL: np.ndarray, vocab_size: int) -> float:
    """Entropy of the tokens of all positions pooled, in nats (plug-in: low by about (V - 1) / 2SL at most)."""
    counts_V = np.bincount(ids_SL.ravel(), minlength=vocab_size)
    return entropy(counts_V / counts_V.sum())


def total_correlation(ids_SL: np.ndarray) -> float:
    """Plug-in estimate of sum_i H(X_i) - H(X_1..X_L) in nats.

    The joint's entropy is estimated from the frequencies of whole samples, and cannot exceed ln S: where the
    samples are (almost) all different the estimate tells of S, not of the law. Compare with that of as many
    samples of the task.
    """
    marginals = sum(entropy(np.unique(ids_S, return_counts=True)[1] / len(ids_SL)) for ids_S in ids_SL.T)
    return marginals - entropy(np.unique(ids_SL, axis=0, return_counts=True)[1] / len(ids_SL))


def factorisation_error(ids_SL: np.ndarray, task: SyntheticTask) -> float | None:
    """KL of the samples' frequencies from the task's law, in nats; infinite where a sample is impossible.

    By enumeration (`SyntheticTask.all_probs`), None where the sequences are too many. The plug-in is high by about
    (number of different sequences - 1) / 2S, which as many samples of the task itself show.
    """
    if task.all_probs() is None:
        return None
    sequences, counts = np.unique(ids_SL, axis=0, return_counts=True)
    frequencies = counts / counts.sum()
    return float((frequencies * (np.log(frequencies) - task.log_probs(sequences))).sum())
