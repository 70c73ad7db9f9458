"""The vocabulary axis when every tensor-parallel rank holds one contiguous shard of it.

Shapes: N positions, V the shard's width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.diffusion.vocabulary import Vocabulary


class ShardedVocabulary(Vocabulary):
    """Reductions over a vocabulary that is split over a tensor-parallel group.

    The losses and draws of `imdm_scale.diffusion` are written in terms of these reductions, the losses with
    hand-written gradients, so that both are exact over shards without ever gathering the logits.

    Args:
        group: the tensor-parallel process group.
        shard_size: ids per rank, padding included; rank r holds ids from r * shard_size on.
    """

    def __init__(self, group: dist.ProcessGroup, shard_size: int) -> None:
        self.group = group
        self.first_id = dist.get_rank(group) * shard_size

    def sum(self, x_NV: Tensor) -> Tensor:
        """Sum over the whole vocabulary, (N,), the same on every rank of the group."""
        total_N = super().sum(x_NV)
        if self.group.size() > 1:
            dist.all_reduce(total_N, group=self.group)
        return total_N

    def max(self, x_NV: Tensor) -> Tensor:
        """Maximum over the whole vocabulary, (N,), the same on every rank of the group."""
        largest_N = super().max(x_NV)
        if self.group.size() > 1:
            dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=self.group)
        return largest_N

    def exclusive_sum(self, x_N: Tensor) -> Tensor:
        """Sum over the ranks before this one in the group, (N,); zeros on the first."""
        if self.group.size() == 1:
            return super().exclusive_sum(x_N)
        parts = [
            torch.empty_like(x_N, memory_format=torch.contiguous_format) for _ in range(self.group.size())
        ]
        dist.all_gather(parts, x_N.contiguous(), group=self.group)
        return torch.stack(parts)[: self.group.rank()].sum(0)
