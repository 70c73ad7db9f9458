"""Mixtures: exact shares, every sample of every corpus once an epoch, one integer as position."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.data.mixture import PERIOD, Mixture, quotas
from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.errors import UserError


def mixture(sizes, weights=None, seed=1):
    """Blocks (corpus, number)."""
    return Mixture(
        [
            TokenStream(ArrayCorpus(np.stack([np.full(n, k), np.arange(n)], axis=1).astype(np.int32)), seed)
            for k, n in enumerate(sizes)
        ],
        weights,
    )


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_quotas_are_the_shares_to_a_thousandth(weights):
    exact = np.array(weights) / sum(weights) * PERIOD
    if min(exact) < 1:
        return
    counts = quotas(weights)
    assert sum(counts) == PERIOD and np.all(np.abs(np.array(counts) - exact) < 1)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(
        UserError, match=r"data\.weights gives corpus 1 the share 0\.0001.*give it at least 10"
    ):
        quotas([9999, 1])


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 400), min_size=2, max_size=4),
    st.integers(0, 2**63),
    st.lists(st.integers(1, 700), min_size=1, max_size=6),
)
def test_cuts_do_not_matter_and_every_corpus_is_read_in_its_own_order(sizes, seed, cuts):
    weights = [1 + k for k in range(len(sizes))]
    total = sum(cuts)
    whole = mixture(sizes, weights, seed).batch(0, total)[0]
    stream, start, parts = mixture(sizes, weights, seed), 0, []
    for count in cuts:
        parts.append(stream.batch(start, count)[0])
        start += count
        stream = pickle.loads(pickle.dumps(stream)) if count % 2 else copy.copy(stream)
    assert torch.equal(torch.cat(parts), whole)
    for index, single in enumerate(mixture(sizes, weights, seed).streams):
        mine = whole[whole[:, 0] == index]
        assert torch.equal(mine, single.batch(0, len(mine))[0])


def test_shares_are_exact_in_every_period_and_shuffled_within():
    stream = mixture([50, 70], [3, 1])
    sources = stream.locate(np.arange(5 * PERIOD))[0].reshape(5, PERIOD)
    assert (sources == 0).sum(1).tolist() == [750] * 5
    assert not np.array_equal(sources[0], sources[1])
    # Runs of one corpus: 2 * 750 * 250 / 1000 + 1 = 376 expected, standard deviation 11.9: 60 is five of them.
    assert all(abs((np.diff(row) != 0).sum() + 1 - 376) < 60 for row in sources)


def test_by_size_where_no_weights_are_given_and_a_hash_that_knows_them():
    assert mixture([300, 100]).quotas == [750, 250]
    assert mixture([300, 100]).data_hash == mixture([300, 100], [3, 1]).data_hash
    assert mixture([300, 100]).data_hash != mixture([300, 100], [1, 1]).data_hash
