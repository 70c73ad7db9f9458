"""Orders of the vocabulary, and draws that run through it in them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.diffusion.inverse_cdf import inverse_cdf
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.vocabulary_order import (
    order_by_frequency,
    order_by_projection,
    ranks_of,
    shard_of_ranks,
)

LAST_U = 1.0 - 2.0**-53


@given(st.permutations(range(12)))
def test_ranks_are_the_places_of_ids(ids):
    rank_V = ranks_of(torch.tensor(ids))
    assert rank_V.dtype == torch.int64
    assert [ids[place] for place in rank_V.tolist()] == list(range(12))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_most_frequent_token_comes_first_and_of_equals_the_lowest_id(counts):
    expected = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    assert torch.equal(order_by_frequency(torch.tensor(counts)), ranks_of(torch.tensor(expected)))


def test_the_projection_orders_tokens_along_the_direction_of_largest_variance():
    generator = torch.Generator().manual_seed(0)
    place_V = torch.randn(200, generator=generator, dtype=torch.float64)
    direction_H = torch.nn.functional.normalize(
        torch.randn(16, generator=generator, dtype=torch.float64), dim=0
    )
    direction_H *= direction_H[direction_H.abs().argmax()].sign()
    across_VH = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    across_VH -= (across_VH @ direction_H)[:, None] * direction_H
    embedding_VH = 5 + 3 * place_V[:, None] * direction_H
    # Without a component across, the order is that of the places; with a small one it is close to it.
    assert torch.equal(order_by_projection(embedding_VH), ranks_of(place_V.argsort()))
    near = order_by_projection((embedding_VH + 0.1 * across_VH).float())
    assert (near - ranks_of(place_V.argsort())).abs().float().mean() < 5
    assert sorted(near.tolist()) == list(range(200))
    twice = torch.cat([embedding_VH, embedding_VH])
    rank_V = order_by_projection(twice)
    assert torch.equal(rank_V[200:], rank_V[:200] + 1)


@given(vocab=st.integers(1, 40), shards=st.integers(1, 6))
def test_shards_of_an_order_and_its_padding(vocab, shards):
    width = -(-vocab // shards)
    rank_V = torch.randperm(vocab, generator=torch.Generator().manual_seed(vocab))
    parts = torch.cat([shard_of_ranks(rank_V, shard * width, width) for shard in range(shards)])
    assert torch.equal(parts[:vocab], rank_V)
    assert sorted(parts.tolist()) == list(range(shards * width))


def test_the_order_of_ids_draws_as_no_order_does():
    logits = 3 * torch.randn(500, 77, generator=torch.Generator().manual_seed(0))
    u = uniform(0, torch.arange(500), Purpose.TOKEN, 0, 1, dtype=torch.float64).flatten()
    assert torch.equal(inverse_cdf(logits, u, rank_V=torch.arange(77)), inverse_cdf(logits, u))


def test_u_runs_through_the_tokens_in_their_order():
    """With p = (1/2, 1/8, 1/4, 1/8) in the order 2, 0, 3, 1 the steps are at 1/4, 3/4 and 7/8."""
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125], dtype=torch.float64).log().expand(8, -1)
    u = torch.tensor([0.0, 0.249999, 0.25, 0.749999, 0.75, 0.874999, 0.875, LAST_U], dtype=torch.float64)
    rank_V = ranks_of(torch.tensor([2, 0, 3, 1]))
    assert inverse_cdf(logits, u, rank_V=rank_V).tolist() == [2, 2, 0, 0, 3, 3, 1, 1]


def test_a_row_with_nan_gives_an_id():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 4] = torch.nan
    u = torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64)
    rank_V = ranks_of(torch.arange(9).flip(0))
    ids = inverse_cdf(broken, u, rank_V=rank_V)
    assert 0 <= ids[1].item() < 9
    assert torch.equal(ids[[0, 2]], inverse_cdf(logits, u, rank_V=rank_V)[[0, 2]])
