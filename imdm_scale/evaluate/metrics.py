"""Quality of generated token ids: perplexity under a judge, and entropy against collapse.

B batch, L length.
"""

from __future__ import annotations

import numpy as np

from imdm_scale.evaluate.ngram import NgramEvaluator


def generative_perplexity(evaluator: NgramEvaluator, ids_BL: np.ndarray) -> float:
    """exp of the mean negative log-likelihood, over the tokens of all samples together.

    The rule of the masked-diffusion literature (MDLM, arXiv 2406.07524, and its successors): every token
    but a row's first is a target unless it is EOS; of a row's EOS tokens the first one is a target.

    Raises:
        ValueError: no target at all, or ids outside the evaluator's vocabulary.
    """
    ids_BL = np.asarray(ids_BL)
    is_eos = ids_BL == evaluator.eos_id
    target = (~is_eos | (is_eos.cumsum(axis=1) == 1))[:, 1:]
    if not target.any():
        raise ValueError("the samples hold no token that perplexity counts")
    return float(np.exp(-evaluator.log_probs(ids_BL)[target].mean()))


def unigram_entropy(ids_BL: np.ndarray) -> float:
    """Entropy in nats of the token frequencies within a sample, averaged over the samples.

    -sum_v f_v ln f_v with f_v the share of id v among the sample's L ids, special ones included. It falls
    when samples repeat themselves, which perplexity alone rewards.
    """
    rows = np.sort(np.asarray(ids_BL), axis=1)
    num_rows, length = rows.shape
    starts_run = np.ones_like(rows, dtype=bool)
    starts_run[:, 1:] = rows[:, 1:] != rows[:, :-1]
    counts = np.diff(np.append(np.flatnonzero(starts_run), rows.size))
    # Of L ids, a run of c equal ones adds -(c/L) ln(c/L) to its row's entropy.
    return float(-(counts / length * np.log(counts / length)).sum() / num_rows)
