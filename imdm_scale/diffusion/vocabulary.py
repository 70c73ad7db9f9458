"""Reductions over the vocabulary axis, so that one formula serves whole and cut vocabularies.

Shapes: N positions, V vocabulary, or the part of it that this process holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Vocabulary:
    """The whole vocabulary on one process.

    A model whose head is cut over processes subclasses this: shards are contiguous and in the order of ids,
    `first_id` is then the id of this shard's first column, and the reductions are over all shards. Gradients
    of what is built on them are written by hand, so none needs to be differentiable.
    """

    first_id: int = 0

    def sum(self, x_NV: Tensor) -> Tensor:
        """Sum over all columns of all shards: (N, V) -> (N,)."""
        return x_NV.sum(-1)

    def max(self, x_NV: Tensor) -> Tensor:
        """Maximum over all columns of all shards: (N, V) -> (N,)."""
        return x_NV.amax(-1)

    def exclusive_sum(self, x_N: Tensor) -> Tensor:
        """Sum of what the shards of smaller ids hold, without this one's: (N,) -> (N,)."""
        return torch.zeros_like(x_N)


WHOLE = Vocabulary()
"""The vocabulary that no one has cut."""
