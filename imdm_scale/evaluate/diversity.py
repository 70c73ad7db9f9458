"""How different texts are from one another: distinct-n and self-BLEU over token ids.

S samples, L positions, G different n-grams.
"""

from __future__ import annotations

import numpy as np

BLEU_ORDER = 4
NO_MATCH = 0.1
"""Stands in for a number of matches that is 0 (Chen and Cherry 2014, smoothing method 1, as Texygen uses it)."""


def distinct_n(ids_SL: np.ndarray, n: int) -> float:
    """Share of different n-grams among all n-grams of all samples (Li et al., arXiv 1510.03055).

    It falls with the number of samples, so only figures of equally many samples of a length can be compared.

    Raises:
        ValueError: the samples are shorter than n.
    """
    grams = _ngrams(ids_SL, n)
    return len(np.unique(grams)) / grams.size


def self_bleu(ids_SL: np.ndarray) -> float:
    """Mean BLEU-4 of each sample with all others as references (Zhu et al., Texygen, arXiv 1802.01886); high where
    samples repeat one another.

    BLEU (Papineni et al. 2002) is exp(mean over n = 1..4 of ln p_n), p_n the share of the sample's n-grams that
    match, each counted at most as often as in that reference where it is most frequent. All samples have the
    same length, so there is no brevity penalty. Samples shorter than 4 are compared up to their length.

    Raises:
        ValueError: fewer than two samples.
    """
    num_samples, length = ids_SL.shape
    if num_samples < 2:
        raise ValueError("self-BLEU compares each sample with others, but there is only one")
    orders = range(1, min(BLEU_ORDER, length) + 1)
    log_precision_S = np.zeros(num_samples)
    for n in orders:
        matches_S = _clipped_matches(_ngrams(ids_SL, n))
        log_precision_S += np.log(np.maximum(matches_S, NO_MATCH) / (length - n + 1))
    return float(np.exp(log_precision_S / len(orders)).mean())


def _ngrams(ids_SL: np.ndarray, n: int) -> np.ndarray:
    """All n-grams as integers, equal where they are: int64 (S, L - n + 1)."""
    ids_SL = np.asarray(ids_SL, dtype=np.int64)
    if ids_SL.shape[1] < n:
        raise ValueError(f"samples of {ids_SL.shape[1]} ids have no {n}-grams")
    grams = ids_SL
    for step in range(1, n):
        # Numbered anew at each length, so that no key outgrows 64 bits.
        _, numbered = np.unique(grams, return_inverse=True)
        _, following = np.unique(ids_SL[:, step:], return_inverse=True)
        grams = numbered.reshape(grams.shape)[:, :-1] * (following.max() + 1) + following.reshape(
            len(ids_SL), -1
        )
    return grams


def _clipped_matches(grams: np.ndarray) -> np.ndarray:
    """Of each sample: its n-grams that also stand in others, counted with the clipping of BLEU: int64 (S,)."""
    num_samples, width = grams.shape
    different, numbered = np.unique(grams, return_inverse=True)
    pairs = numbered.ravel() * num_samples + np.repeat(np.arange(num_samples), width)
    pair, count = np.unique(pairs, return_counts=True)
    gram, sample = np.divmod(pair, num_samples)
    # By n-gram, and within one by falling count: the first two say what is the most in any other sample.
    order = np.lexsort((-count, gram))
    gram, sample, count = gram[order], sample[order], count[order]
    first_G = np.flatnonzero(np.diff(gram, prepend=-1))
    is_shared_G = np.diff(np.append(first_G, len(gram))) > 1
    most_G, second_G = count[first_G], np.zeros(len(different), dtype=np.int64)
    second_G[is_shared_G] = count[first_G[is_shared_G] + 1]
    is_first = np.zeros(len(gram), dtype=bool)
    is_first[first_G] = True
    most_elsewhere = np.where(is_first, second_G[gram], most_G[gram])
    matches = np.minimum(count, most_elsewhere)
    return np.bincount(sample, weights=matches, minlength=num_samples)
