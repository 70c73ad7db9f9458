"""Cutting whole tensors over tensor-parallel ranks, and putting them together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from imdm_scale.model.placement import Placement, padded_vocab_size

TP_SIZES = st.sampled_from([1, 2, 4])


def there_and_back(placement: Placement, whole: Tensor, tp_size: int) -> list[Tensor]:
    shards = [placement.to_shard(whole, rank, tp_size) for rank in range(tp_size)]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(placement.to_whole(shards), whole)
    return shards


@given(TP_SIZES, st.integers(1, 300), st.sampled_from([(), (3,)]))
def test_vocabulary_rows_are_padded_and_cut(tp_size: int, vocab_size: int, rest: tuple[int, ...]) -> None:
    whole = 1 + torch.arange(vocab_size * (3 if rest else 1)).float().view(vocab_size, *rest)
    shards = there_and_back(Placement("head.weight", 0, vocab_size=vocab_size), whole, tp_size)
    padded = torch.cat(shards)
    assert len(padded) == padded_vocab_size(vocab_size, tp_size) < vocab_size + tp_size
    assert torch.equal(padded[:vocab_size], whole)
    assert not padded[vocab_size:].any()


@given(TP_SIZES, st.integers(1, 3), st.integers(1, 5))
def test_query_key_value_go_by_head(tp_size: int, heads_per_rank: int, head_dim: int) -> None:
    heads = heads_per_rank * tp_size
    kind, head, place = torch.meshgrid(
        torch.arange(3), torch.arange(heads), torch.arange(head_dim), indexing="ij"
    )
    whole = torch.stack([kind, head, place], dim=-1).flatten(0, 2)
    shards = there_and_back(Placement("qkv", 0, qkv_heads=heads), whole, tp_size)
    for rank, shard in enumerate(shards):
        by_head = shard.view(heads_per_rank, 3, head_dim, 3)
        assert (by_head[..., 0] == torch.arange(3)[:, None]).all()
        assert (by_head[..., 1] == rank * heads_per_rank + torch.arange(heads_per_rank)[:, None, None]).all()
        assert (by_head[..., 2] == torch.arange(head_dim)).all()


@given(TP_SIZES, st.integers(1, 5), st.sampled_from([(), (3,)]))
def test_a_rank_has_the_same_part_of_gate_and_value(
    tp_size: int, columns_per_rank: int, rest: tuple[int, ...]
) -> None:
    width = columns_per_rank * tp_size
    gate = torch.arange(width * (3 if rest else 1)).view(width, *rest)
    shards = there_and_back(Placement("mlp", 0, is_gated=True), torch.cat((gate, -1 - gate)), tp_size)
    for rank, shard in enumerate(shards):
        mine = gate[rank * columns_per_rank :][:columns_per_rank]
        assert torch.equal(shard, torch.cat((mine, -1 - mine)))


@pytest.mark.parametrize("shard_dim", [None, 0, 1])
@given(TP_SIZES, st.integers(1, 4), st.integers(1, 4))
def test_plain_tensors(shard_dim: int | None, tp_size: int, rows: int, columns: int) -> None:
    whole = torch.arange(16 * rows * columns).view(4 * rows, 4 * columns)
    shards = there_and_back(Placement("x", shard_dim), whole, tp_size)
    if shard_dim is None:
        assert all(torch.equal(shard, whole) for shard in shards)
    else:
        assert shards[0].size(shard_dim) * tp_size == whole.size(shard_dim)
