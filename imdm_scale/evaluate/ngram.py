"""A small held-out judge of text: an interpolated modified Kneser-Ney n-gram model over token ids.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling", Computer Speech and
Language 13 (1999), section 3 and equations (25)-(28): with c the count of an n-gram (h, w), h' the context h
without its oldest token and N_i(h) the number of tokens that follow h with count i (3: three or more),

    p(w | h) = (c(h w) - D(c(h w))) / c(h .)  +  gamma(h) p(w | h')
    gamma(h) = (D_1 N_1(h) + D_2 N_2(h) + D_3 N_3(h)) / c(h .)

The highest order counts occurrences, lower ones how many different tokens stand before the n-gram; the
start of a row counts as different every time, as nothing can stand before it. Below the unigrams is the
uniform law.

B batch, L length. An n-gram is one int64 key, its tokens being the digits of a number to the base of the
vocabulary's size, so that sorting and searching keys is all that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imdm_scale.errors import UserError


@dataclass(frozen=True)
class _Order:
    """One order's n-grams and contexts, both sorted by key."""

    keys: np.ndarray
    """int64 keys of the n-grams seen."""
    mass: np.ndarray
    """float64, their discounted share (c(hw) - D) / c(h.)."""
    contexts: np.ndarray
    """int64 keys of the contexts seen."""
    backoff: np.ndarray
    """float64, their gamma(h)."""


class NgramEvaluator:
    """Probabilities of the tokens of a row, each given up to order - 1 tokens before it."""

    def __init__(self, orders: list[_Order], vocab_size: int, eos_id: int, num_tokens: int) -> None:
        """Use `fit`."""
        self._orders = orders
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.num_tokens = num_tokens

    @property
    def description(self) -> str:
        """What the evaluator is, for the reader of a table."""
        return f"{len(self._orders)}-gram model, modified Kneser-Ney, fitted to {self.num_tokens:,} tokens"

    @classmethod
    def fit(cls, blocks: np.ndarray, vocab_size: int, order: int = 4, *, eos_id: int) -> NgramEvaluator:
        """Fits the model to rows of token ids, integers (number of rows, L) in [0, vocab_size).

        The first token of a row (BOS) is context only, never predicted. `eos_id` is kept for the metrics.

        Raises:
            UserError: n-grams of this order over this vocabulary have no 64-bit key.
            ValueError: rows shorter than `order`, none at all, or ids outside the vocabulary.
        """
        if vocab_size**order >= 2**63:
            raise UserError(
                f"An evaluator of order {order} over {vocab_size} ids does not fit 64-bit keys; choose an "
                f"order of at most {int(63 * np.log(2) / np.log(vocab_size))}."
            )
        ids_BL = _checked(blocks, vocab_size)
        if len(ids_BL) == 0 or ids_BL.shape[1] < order or order < 2:
            raise ValueError(f"cannot fit order {order} to rows of shape {ids_BL.shape}")
        orders: list[_Order] = []
        keys, counts = np.unique(_keys(ids_BL, order, vocab_size), return_counts=True)
        for n in range(order, 0, -1):
            orders.insert(0, _smooth(keys, counts, vocab_size))
            if n == 1:
                break
            # Each distinct n-gram is one distinct token before its suffix; a row's start adds one each time.
            suffixes = keys % vocab_size ** (n - 1)
            starts = _keys(ids_BL[:, : n - 1], n - 1, vocab_size).ravel() if n > 2 else suffixes[:0]
            keys, counts = np.unique(np.concatenate([suffixes, starts]), return_counts=True)
        return cls(orders, vocab_size, eos_id, ids_BL.shape[0] * (ids_BL.shape[1] - 1))

    def log_probs(self, ids_BL: np.ndarray) -> np.ndarray:
        """Natural-log probability of each token from position 1 on, float64 (B, L - 1).

        Raises:
            ValueError: ids outside the vocabulary.
        """
        ids_BL = _checked(ids_BL, self.vocab_size)
        probs = np.full((ids_BL.shape[0], ids_BL.shape[1] - 1), 1.0 / self.vocab_size)
        for n, order in enumerate(self._orders, 1):
            if n > ids_BL.shape[1]:
                break
            # The first targets of a row have no n - 1 tokens before them and stay with the lower order.
            first = max(0, n - 2)
            keys = _keys(ids_BL if n > 1 else ids_BL[:, 1:], n, self.vocab_size)
            mass = _look_up(keys, order.keys, order.mass, missing=0.0)
            backoff = _look_up(keys // self.vocab_size, order.contexts, order.backoff, missing=1.0)
            probs[:, first:] = mass + backoff * probs[:, first:]
        return np.log(probs)


def _checked(ids_BL: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as int64, known to lie in the vocabulary: others would be taken for another n-gram's key."""
    ids_BL = np.asarray(ids_BL, dtype=np.int64)
    if ids_BL.size and not (ids_BL.min() >= 0 and ids_BL.max() < vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}), seen {ids_BL.min()} to {ids_BL.max()}")
    return ids_BL


def _keys(ids_BL: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Keys of all n-grams within the rows, int64 (B, L - n + 1)."""
    width = ids_BL.shape[1] - n + 1
    keys = np.zeros((ids_BL.shape[0], width), dtype=np.int64)
    for offset in range(n):
        keys = keys * vocab_size + ids_BL[:, offset : offset + width]
    return keys


def _smooth(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
    """Discounts the counts of one order's sorted n-gram keys."""
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(keys // vocab_size, return_index=True)
    totals = np.add.reduceat(counts.astype(np.float64), first)
    backoff = np.add.reduceat(discounts, first) / totals
    followers = np.diff(np.append(first, len(keys)))
    return _Order(keys, (counts - discounts) / np.repeat(totals, followers), contexts, backoff)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """(0, D_1, D_2, D_3) of Chen and Goodman's equation (26), float64.

    The estimate needs n-grams of every count from 1 to 4. Where a toy corpus has none of some, or so few
    that a discount leaves (0, its count), the customary constants 1/2, 1, 3/2 stand in.
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimate[1:] > 0).all():
            return estimate
    return np.array([0.0, 0.5, 1.0, 1.5])


def _look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray, missing: float) -> np.ndarray:
    """values[i] where keys == known[i] (sorted), and `missing` for unknown keys."""
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, values[places], missing)
