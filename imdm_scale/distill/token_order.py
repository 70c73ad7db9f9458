"""The order of the vocabulary in which tokens are drawn in a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from imdm_scale.diffusion.vocabulary_order import TokenOrder, order_by_frequency, order_by_projection


def token_order(
    name: str, vocab_size: int, blocks: Callable[[], np.ndarray], embedding: Callable[[], Tensor]
) -> TokenOrder:
    """The order called `name`: of the ids; by frequency in some blocks of text; along the first principal component of
    an embedding (V, H), where similar tokens are neighbours.

    Args:
        blocks, embedding: give what the order is made from; called only where it is.
    """
    if name == "frequency":
        counts_V = np.bincount(blocks().ravel(), minlength=vocab_size)
        return TokenOrder(name, order_by_frequency(torch.from_numpy(counts_V)))
    if name == "embedding":
        return TokenOrder(name, order_by_projection(embedding()))
    return TokenOrder()
