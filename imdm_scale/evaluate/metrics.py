"""Quality of generated token ids: perplexity under a judge, and entropy against collapse.

B batch, L length, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imdm_scale.evaluate.ngram import NgramEvaluator


@dataclass(frozen=True)
class SampleScores:
    """What a judge says of each sample, from which any subset's perplexity follows."""

    nll_S: np.ndarray
    """float64, sum of the negative log-likelihoods of a sample's targets, in nats."""
    targets_S: np.ndarray
    """int64, number of its targets."""

    def grouped(self, each: int) -> SampleScores:
        """As many samples as belong together as one each: the same perplexity, for intervals over groups."""
        return SampleScores(
            self.nll_S.reshape(-1, each).sum(axis=1), self.targets_S.reshape(-1, each).sum(axis=1)
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over the targets of all samples together.

        Raises:
            ValueError: no target at all.
        """
        if not self.targets_S.sum():
            raise ValueError("the samples hold no token that perplexity counts")
        return float(np.exp(self.nll_S.sum() / self.targets_S.sum()))


def targets(ids_BL: np.ndarray, eos_id: int) -> np.ndarray:
    """Which tokens from position 1 on count: bool (B, L - 1).

    The rule of the masked-diffusion literature (MDLM, arXiv 2406.07524, and its successors): every token
    but a row's first is a target unless it is EOS; of a row's EOS tokens the first one is a target.
    """
    is_eos = ids_BL == eos_id
    return (~is_eos | (is_eos.cumsum(axis=1) == 1))[:, 1:]


def token_scores(evaluator: NgramEvaluator, ids_BL: np.ndarray) -> SampleScores:
    """Each row under a model of token ids.

    Raises:
        ValueError: ids outside the evaluator's vocabulary.
    """
    ids_BL = np.asarray(ids_BL)
    counts = targets(ids_BL, evaluator.eos_id)
    nll_S = np.where(counts, -evaluator.log_probs(ids_BL), 0.0).sum(axis=1)
    return SampleScores(nll_S, counts.sum(axis=1))


def generative_perplexity(evaluator: NgramEvaluator, ids_BL: np.ndarray) -> float:
    """Perplexity of the targets of all rows together.

    Raises:
        ValueError: no target at all, or ids outside the evaluator's vocabulary.
    """
    return token_scores(evaluator, ids_BL).perplexity


def unigram_entropy(ids_BL: np.ndarray) -> float:
    """Mean of `sample_entropies`. It falls when samples repeat themselves, which perplexity alone rewards."""
    return float(sample_entropies(ids_BL).mean())


def sample_entropies(ids_BL: np.ndarray) -> np.ndarray:
    """Entropy in nats of the token frequencies within each sample: float64 (B,).

    -sum_v f_v ln f_v with f_v the share of id v among the sample's L ids, special ones included.
    """
    rows = np.sort(np.asarray(ids_BL), axis=1)
    num_rows, length = rows.shape
    starts_run = np.ones_like(rows, dtype=bool)
    starts_run[:, 1:] = rows[:, 1:] != rows[:, :-1]
    starts = np.flatnonzero(starts_run)
    counts = np.diff(np.append(starts, rows.size))
    # Of L ids, a run of c equal ones adds -(c/L) ln(c/L) to its row's entropy.
    parts = -(counts / length * np.log(counts / length))
    return np.bincount(starts // length, weights=parts, minlength=num_rows)
