"""Finitely many masks (IMDM, arXiv 2605.10518): each masked position holds one of K masks, all equally likely.

K masks are infinitely many of which the network can tell K apart: it reads of the noise e only in which K-th of its
law's range the first dimension lies. So everything that draws, keeps or resets noise is the same for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coupling import uniform_of


def mask_index(noise: Tensor, num_masks: int, kind: str = "uniform", scale: float = 1.0) -> Tensor:
    """Which of K masks a position holds, int64 (...) in [0, K), uniform over the law of the noise.

    Args:
        noise: float32 (..., D), D at least 1; only the first dimension is read.
        num_masks: K; beyond 2^24 float32 noise could not name them all.
        kind, scale: the noise's law.

    Raises:
        ValueError: a `kind` that `coupling.uniform_of` does not know.
    """
    return (uniform_of(noise[..., 0], kind, scale) * num_masks).to(torch.int64)
