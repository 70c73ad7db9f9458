"""Reductions over the vocabulary axis, so that one formula serves whole and cut vocabularies.

Shapes: N positions, V vocabulary, or the part of it that this process holds.
"""

from __future__ import annotations

from torch import Tensor


class Vocabulary:
    """The whole vocabulary on one process.

    A model whose head is cut over processes subclasses this: `first_id` is then the id of its first column,
    and `sum` and `max` reduce over the columns of all shards. Gradients of what is built on them are written
    by hand, so neither needs to be differentiable.
    """

    first_id: int = 0

    def sum(self, x_NV: Tensor) -> Tensor:
        """Sum over all columns of all shards: (N, V) -> (N,)."""
        return x_NV.sum(-1)

    def max(self, x_NV: Tensor) -> Tensor:
        """Maximum over all columns of all shards: (N, V) -> (N,)."""
        return x_NV.amax(-1)

    def gather(self, x_NV: Tensor) -> Tensor:
        """The columns of all shards side by side, for drawing a token; the losses never need them."""
        return x_NV


WHOLE = Vocabulary()
"""The vocabulary that no one has cut."""
