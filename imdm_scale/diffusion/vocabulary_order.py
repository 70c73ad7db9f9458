"""Orders of the vocabulary, in which an inverse CDF runs through the tokens.

Any order gives the same law. But where a network has to read the token from the uniform u (`coupling.py`), an order
in which similar tokens are neighbours makes the token as smooth a function of u as it can be.

An order is kept as ranks: rank_V[v] is the place of token v, a permutation of 0, ..., V - 1.

Shapes: V vocabulary, S one shard of it, H width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """An order by name, and what it means for a vocabulary."""

    name: str = "identity"
    rank_V: Tensor | None = None
    """int64 place of each token; None is the order of ids."""


def order_by_frequency(counts_V: Tensor) -> Tensor:
    """The most frequent token first, of equals the lowest id: int64 ranks (V,) on the device of the counts."""
    return ranks_of(counts_V.argsort(descending=True, stable=True))


def order_by_projection(embedding_VH: Tensor) -> Tensor:
    """Tokens along the first principal component of their embeddings, so that similar ones are near each other.

    Computed in float64 on the CPU. The direction's sign is such that its largest element (the first of equals) is
    positive.

    Args:
        embedding_VH: any floating type.

    Returns:
        int64 ranks (V,) on the CPU; of equal projections the lowest id comes first.
    """
    x_VH = embedding_VH.detach().double().cpu()
    x_VH = x_VH - x_VH.mean(0)
    direction_H = torch.linalg.eigh(x_VH.t() @ x_VH).eigenvectors[:, -1]
    direction_H = direction_H * direction_H[direction_H.abs().argmax()].sign()
    return ranks_of((x_VH @ direction_H).argsort(stable=True))


def ranks_of(ids_V: Tensor) -> Tensor:
    """Places of the ids, from the ids in order: the inverse permutation, int64 (V,)."""
    return torch.empty_like(ids_V).index_copy_(0, ids_V, torch.arange(len(ids_V), device=ids_V.device))


def shard_of_ranks(rank_V: Tensor, first_id: int, width: int) -> Tensor:
    """The ranks of `width` ids from `first_id` on: int64 (S,). Ids that pad the vocabulary come after all tokens."""
    padded = torch.arange(len(rank_V), max(len(rank_V), first_id + width), device=rank_V.device)
    return torch.cat([rank_V, padded])[first_id : first_id + width]
