"""Texts and likelihoods do not depend on the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.cases import sampled
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_config, tensor_parallel, zero
from tests.tiny import tiny


def test_the_same_texts_and_likelihood_for_every_layout(pool: RankPool) -> None:
    texts_SL, nelbo = pool.run(sampled, world_size=1, config=small_config(), ds_json=zero(3))[0]
    assert texts_SL.shape == (13, tiny().length)
    assert (texts_SL[:, 0] == 1).all()
    assert 0 <= texts_SL.min() <= texts_SL.max() < tiny().mask_token_id
    assert len(np.unique(texts_SL, axis=0)) == 13

    for theirs_SL, their_nelbo in pool.run(sampled, world_size=2, config=small_config(), ds_json=zero(3)):
        assert np.array_equal(theirs_SL, texts_SL)
        assert their_nelbo == pytest.approx(nelbo, rel=1e-6)

    # Over tensor-parallel ranks sums are rounded otherwise, and a token whose draw falls on the border of two
    # becomes the other. A first such token changes the rest of its text, so texts are counted.
    for theirs_SL, their_nelbo in pool.run(
        sampled, world_size=2, config=tensor_parallel(small_config(), 2), ds_json=zero(3)
    ):
        assert (theirs_SL != texts_SL).any(axis=1).sum() <= 1
        assert their_nelbo == pytest.approx(nelbo, rel=1e-5)
