"""Texts and likelihoods do not depend on how the ranks share the network.

Shapes: L positions, S samples, V vocabulary.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch

from imdm_scale.config.tree import Config
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.sampling import sample_texts
from tests.distributed.cases import build, sampled
from tests.distributed.layouts import Case, disaggregated, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_architecture, small_config, zero
from tests.tiny import plain_network, tiny

DISTIL = ("im_sdtt",)
CASES = [
    Case(DISTIL, student() + teacher(), 3, world_size=2),
    Case(DISTIL, student(2) + teacher(1, 2), 0, world_size=2),
    Case(DISTIL, student(1, 2) + teacher(2, 2, True), 3, world_size=4),
    Case(DISTIL, student(2, 2) + teacher(4), 1, world_size=4),
    Case(DISTIL, student(1, 2) + teacher(2) + disaggregated(2), 3, world_size=4),
]


COUPLED_CASES = [
    Case((*case.what, "model.noise_fourier=3"), *astuple(case)[1:]) for case in (CASES[0], CASES[3])
]
RANK_V = torch.randperm(tiny().vocab_size, generator=torch.Generator().manual_seed(0))
COUPLED = ("coupled", "coupled_argmax")


def sampled_by_noise(config: Config, ds_json: dict[str, Any]) -> list[list[np.ndarray]]:
    """Of this rank's networks, the student first: texts (S, L) of the coupled samplers in an order of the tokens."""
    _, parts = build(config, ds_json)
    return [
        [
            sample_texts(
                model, SamplerSettings(4), 13, batch_size=4, seed=5, bos_id=1, sampler=sampler, rank_V=RANK_V
            ).numpy()
            for sampler in COUPLED
        ]
        for model in (parts.student, parts.teacher)
        if model is not None
    ]


@pytest.mark.parametrize("case", COUPLED_CASES, ids=str)
def test_coupled_texts_are_those_of_the_exported_model(pool: RankPool, case: Case) -> None:
    exported = plain_network(small_architecture(case.config))
    exported.vocabulary_rank = RANK_V
    results = pool.run(sampled_by_noise, case.world_size, config=case.config, ds_json=zero(case.stage))
    for sampler, *of_ranks in zip(
        COUPLED, *(zip(*networks, strict=True) for networks in results), strict=True
    ):
        expected_SL = exported.generate_text(13, 4, seed=5, prefix_ids=[1], sampler=sampler).numpy()
        assert len(np.unique(expected_SL, axis=0)) == 13
        for rank, of_networks in enumerate(of_ranks):
            roles = [role for role in case.layout.roles if rank in role.ranks]
            for role, texts_SL in zip(roles, of_networks, strict=True):
                # As above: over tensor-parallel ranks a draw may fall on the other side of a border.
                assert (texts_SL != expected_SL).any(axis=1).sum() <= (1 if role.tp > 1 else 0)


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
