"""The stream: every block once an epoch, and one order whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.errors import UserError


def blocks(number):
    """Blocks whose first token is their own number."""
    return np.stack([np.arange(number), np.zeros(number, int), np.arange(number) + 7], axis=1).astype(
        np.int32
    )


@given(st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 5))
def test_every_block_once_an_epoch(number, seed, epoch):
    ids_BL, samples = TokenStream(ArrayCorpus(blocks(number)), seed).batch(epoch * number, number)
    assert ids_BL.dtype == samples.dtype == torch.int64
    assert sorted(ids_BL[:, 0].tolist()) == list(range(number))
    assert torch.equal(ids_BL[:, 2], ids_BL[:, 0] + 7)
    assert samples.tolist() == list(range(epoch * number, (epoch + 1) * number))


@given(st.integers(1, 23), st.integers(0, 100), st.integers(1, 60))
def test_order_does_not_depend_on_how_batches_are_cut(number, first, count):
    whole, _ = TokenStream(ArrayCorpus(blocks(number)), seed=5).batch(0, first + count)
    ids_BL, samples = TokenStream(ArrayCorpus(blocks(number)), seed=5).batch(first, count)
    assert samples.tolist() == list(range(first, first + count))
    assert torch.equal(ids_BL, whole[samples])


def test_orders_differ_between_epochs_and_seeds_and_are_uniform():
    stream = TokenStream(ArrayCorpus(blocks(100)), seed=0)
    orders = [stream.batch(epoch * 100, 100)[0][:, 0] for epoch in range(300)]
    other = TokenStream(ArrayCorpus(blocks(100)), seed=1).batch(0, 100)[0][:, 0]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], other)
    # Mean place of each block over 300 epochs: 49.5 with standard deviation 28.87 / sqrt(300) = 1.67. That
    # one of 100 blocks is off by more than 5.5 of these has a chance of 4e-6, and the seed fixes the draws.
    places = torch.stack([torch.argsort(order) for order in orders]).double().mean(0)
    assert (places - 49.5).abs().max() < 5.5 * 1.67


def test_no_blocks():
    with pytest.raises(UserError, match="does not fill one block"):
        ArrayCorpus(blocks(1)[:0])
