"""Texts and likelihoods do not depend on how the ranks share the network.

Shapes: L positions, S samples.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.cases import sampled
from tests.distributed.layouts import Case, disaggregated, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_config, zero
from tests.tiny import tiny

DISTIL = ("im_sdtt",)
CASES = [
    Case(DISTIL, student() + teacher(), 3, world_size=2),
    Case(DISTIL, student(2) + teacher(1, 2), 0, world_size=2),
    Case(DISTIL, student(1, 2) + teacher(2, 2, True), 3, world_size=4),
    Case(DISTIL, student(2, 2) + teacher(4), 1, world_size=4),
    Case(DISTIL, student(1, 2) + teacher(2) + disaggregated(2), 3, world_size=4),
]


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> tuple[np.ndarray, float]:
    """Texts (S, L) of a network on one rank, and its likelihood bound."""
    return pool.run(sampled, 1, config=small_config(), ds_json=zero(1))[0][0]


def test_texts_are_texts(alone: tuple[np.ndarray, float]) -> None:
    texts_SL, nelbo = alone
    assert texts_SL.shape == (13, tiny().length)
    assert (texts_SL[:, 0] == 1).all()
    assert 0 <= texts_SL.min() <= texts_SL.max() < tiny().mask_token_id
    assert len(np.unique(texts_SL, axis=0)) == 13
    assert nelbo > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_texts_and_likelihood_for_every_layout(
    pool: RankPool, alone: tuple[np.ndarray, float], case: Case
) -> None:
    texts_SL, nelbo = alone
    results = pool.run(sampled, case.world_size, config=case.config, ds_json=zero(case.stage))
    for rank, of_networks in enumerate(results):
        roles = [role for role in case.layout.roles if rank in role.ranks]
        for role, (their_texts_SL, their_nelbo) in zip(roles, of_networks, strict=True):
            # Over tensor-parallel ranks sums are rounded otherwise, and a token whose draw falls on the border of
            # two becomes the other. A first such token changes the rest of its text, so texts are counted.
            allowed = 1 if role.tp > 1 else 0
            assert (their_texts_SL != texts_SL).any(axis=1).sum() <= allowed
            assert their_nelbo == pytest.approx(nelbo, rel=1e-6)
