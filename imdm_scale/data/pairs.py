"""Couplings of a noisy state and the text to which a teacher led it, as rows of a prepared folder.

A pair is (x_t, x_0, t, number): the state, the text, the state's time, and the name of the noise e that the state's
masks carry. A row holds the two sequences and then, in digits of 16 bits so that any stored type takes them, t and the
number. So shards, manifest, verification, cache and the order of reading are those of text.

Shapes: B pairs, L positions, W integers in a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PACKING = "pairs"
"""What the manifest's options say of how such a folder's rows are packed."""
TIME_DIGITS, NUMBER_DIGITS = 2, 4
DIGIT_BITS = 16


class Pairs(NamedTuple):
    """Some couplings."""

    x_t_BL: np.ndarray
    """int64 ids, the mask id where the state is masked."""
    x_0_BL: np.ndarray
    """int64 ids without masks; equal to x_t where that is not masked."""
    t_B: np.ndarray
    """float32 times in (0, 1]."""
    numbers_B: np.ndarray
    """int64, from 0 on: with the folder's seed they name the noise, and every draw that made the pair."""


def row_width(length: int) -> int:
    """Integers W in the row of a pair of sequences of `length` ids."""
    return 2 * length + TIME_DIGITS + NUMBER_DIGITS


def pack_pairs(pairs: Pairs) -> np.ndarray:
    """The rows of some pairs, int64 (B, W)."""
    t_bits_B = np.asarray(pairs.t_B, dtype=np.float32).view(np.uint32)
    return np.concatenate(
        [
            pairs.x_t_BL,
            pairs.x_0_BL,
            _digits(t_bits_B.astype(np.int64), TIME_DIGITS),
            _digits(np.asarray(pairs.numbers_B, dtype=np.int64), NUMBER_DIGITS),
        ],
        axis=1,
    )


def unpack_pairs(rows_BW: np.ndarray) -> Pairs:
    """The pairs in some rows, of any integer type."""
    rows_BW = rows_BW.astype(np.int64)
    length = (rows_BW.shape[1] - TIME_DIGITS - NUMBER_DIGITS) // 2
    x_t_BL, x_0_BL, t, numbers = np.split(rows_BW, [length, 2 * length, 2 * length + TIME_DIGITS], axis=1)
    return Pairs(x_t_BL, x_0_BL, _number(t).astype(np.uint32).view(np.float32), _number(numbers))


def _digits(numbers_B: np.ndarray, count: int) -> np.ndarray:
    """Digits of non-negative numbers, the least significant first, (B, count)."""
    return (numbers_B[:, None] >> (DIGIT_BITS * np.arange(count))) & ((1 << DIGIT_BITS) - 1)


def _number(digits: np.ndarray) -> np.ndarray:
    return (digits << (DIGIT_BITS * np.arange(digits.shape[1]))).sum(axis=1)
