"""How a whole tensor is cut over tensor-parallel ranks, and put together again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to equal shards. Padded ids are never seen outside the embedding and head."""
    return -(-vocab_size // tp) * tp


@dataclass(frozen=True)
class Placement:
    """How one whole tensor is cut over tensor-parallel ranks."""

    name: str
    """Canonical name."""
    shard_dim: int | None
    """The dimension that is cut, None where every rank has the whole."""
    qkv_heads: int = 0
    """Number of heads of a fused q, k, v projection, whose rows Megatron orders head by head; else 0."""
    is_gated: bool = False
    """Whether the rows are SwiGLU's gate above its value, of each of which a rank has a part."""
    vocab_size: int = 0
    """Rows before padding, where the rows are token ids; else 0."""

    def to_shard(self, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """The part of a whole canonical tensor that rank `tp_rank` of `tp_size` holds."""
        if self.qkv_heads:
            whole = _swap_leading(whole, 3, self.qkv_heads)
        if self.is_gated:
            whole = _swap_leading(whole, 2, tp_size)
        if self.vocab_size:
            rows = padded_vocab_size(self.vocab_size, tp_size) - self.vocab_size
            if rows:
                whole = F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, rows))
        return whole if self.shard_dim is None else whole.chunk(tp_size, dim=self.shard_dim)[tp_rank]

    def to_whole(self, shards: list[Tensor]) -> Tensor:
        """Inverse of `to_shard`, from the shards of all tensor-parallel ranks in order."""
        joined = shards[0] if self.shard_dim is None else torch.cat(shards, dim=self.shard_dim)
        return self.uncut(joined, len(shards))

    def uncut(self, joined: Tensor, tp_size: int) -> Tensor:
        """The whole canonical tensor from the shards of `tp_size` ranks, joined along the dimension that is cut."""
        if self.vocab_size:
            joined = joined[: self.vocab_size]
        if self.is_gated:
            joined = _swap_leading(joined, tp_size, 2)
        return _swap_leading(joined, self.qkv_heads, 3) if self.qkv_heads else joined


def _swap_leading(x: Tensor, first: int, second: int) -> Tensor:
    """Rows ordered (first, second, rest) -> (second, first, rest)."""
    return x.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)
