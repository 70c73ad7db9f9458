"""Pairs do not depend on how the ranks share the network, nor on batches; and they hold what training reads.

Shapes: B pairs, L positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.config.tree import Config
from imdm_scale.data.pairs import Pairs, pack_pairs
from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.sampler import SamplerSettings, sample
from imdm_scale.distill.pair_generation import PairMaker, noisy_states
from imdm_scale.distill.stored_pairs import StoredPairs
from tests.distributed.cases import build
from tests.distributed.layouts import Case, student
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_architecture, small_blocks, small_config, zero
from tests.tiny import plain_network, tiny

SEED, NUM_STEPS, T_MIN = 4, 3, 0.1
NUMBERS = range(5, 18)
CASES = [
    Case(("pretrain",), student(), 3, world_size=2),
    Case(("pretrain",), student(2), 0, world_size=4),
    Case(("pretrain",), student(2, 2), 1, world_size=4),
]


def made(config: Config, ds_json: dict[str, Any]) -> list[Pairs]:
    """The same pairs in batches of 2, of 5, and in two calls."""
    _, parts = build(config, ds_json)
    assert parts.student is not None

    def maker(batch_size: int) -> PairMaker:
        assert parts.student is not None
        return PairMaker(
            network=parts.student,
            stream=TokenStream(ArrayCorpus(small_blocks()), SEED),
            settings=SamplerSettings(NUM_STEPS),
            seed=SEED,
            t_min=T_MIN,
            batch_size=batch_size,
        )

    counts: list[int] = []
    first = maker(2).make(NUMBERS, counts.append)
    assert sum(counts) == len(NUMBERS)
    halves = [maker(4).make(range(5, 9)), maker(4).make(range(9, 18))]
    return [first, maker(5).make(NUMBERS), Pairs(*map(np.concatenate, zip(*halves, strict=True)))]


def plain_pairs() -> Pairs:
    """By the plain network, one at a time."""
    architecture = small_architecture(small_config())
    network = plain_network(architecture).eval()
    stream = TokenStream(ArrayCorpus(small_blocks()), SEED)
    found = []
    for number in NUMBERS:
        numbers_1 = torch.tensor([number])
        x_0_1L, _ = stream.batch(number, 1)
        states = noisy_states(SEED, numbers_1, x_0_1L, T_MIN, architecture.mask_token_id)
        text_1L = sample(
            lambda x_BL, noise_BLD: network(x_BL, mask_noise=noise_BLD).logits,
            states.x_t_BL,
            settings=SamplerSettings(NUM_STEPS),
            seed=SEED,
            sample_ids_B=numbers_1,
            mask_id=architecture.mask_token_id,
            noise_dim=architecture.noise_dim,
            start_time=states.t_B,
        )
        found.append(
            Pairs(states.x_t_BL.numpy(), text_1L.numpy(), states.t_B.float().numpy(), numbers_1.numpy())
        )
    return Pairs(*map(np.concatenate, zip(*found, strict=True)))


@pytest.fixture(scope="module")
def expected() -> Pairs:
    """See `plain_pairs`."""
    return plain_pairs()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_pairs_for_every_layout(pool: RankPool, expected: Pairs, case: Case) -> None:
    for of_rank in pool.run(made, case.world_size, config=case.config, ds_json=zero(case.stage)):
        for pairs in of_rank:
            assert (pairs.x_t_BL == expected.x_t_BL).all()
            assert (pairs.t_B == expected.t_B).all()
            assert pairs.numbers_B.tolist() == list(NUMBERS)
            # Over tensor-parallel ranks a draw may fall on the other side of a border.
            allowed = 1 if case.layout.student.tp > 1 else 0
            assert (pairs.x_0_BL != expected.x_0_BL).any(axis=1).sum() <= allowed


def test_a_pair_is_a_text_and_its_state(expected: Pairs) -> None:
    mask_id = tiny().mask_token_id
    masked_BL = expected.x_t_BL == mask_id
    assert (expected.x_0_BL != mask_id).all()
    assert (expected.x_0_BL[~masked_BL] == expected.x_t_BL[~masked_BL]).all()
    assert 0 < masked_BL.mean() < 1


def test_training_reads_the_noise_that_the_sampler_began_with(expected: Pairs) -> None:
    """Bit for bit; with fresh noise it is another one in every update."""
    architecture = small_architecture(small_config())
    rows_BW = torch.from_numpy(pack_pairs(expected))
    ids_B = torch.arange(len(rows_BW))
    at_start_BLD = mask_noise(
        SEED, torch.from_numpy(expected.numbers_B), 0, architecture.length, architecture.noise_dim
    )

    def noise(fresh: bool, step: int) -> torch.Tensor:
        source = StoredPairs(architecture, SEED, fresh)
        batch = source.micro_batch(1, step, rows_BW, ids_B, torch.zeros(len(ids_B), dtype=torch.float64))
        assert (batch.t_B.numpy() == expected.t_B.astype(np.float64)).all()
        # Each masked position's own time lies below that of its state: the order of revelation is known.
        assert ((batch.reveal_BL < batch.t_B[:, None]) == batch.masked_BL).all()
        return batch.mask_noise(architecture, torch.device("cpu"))

    assert torch.equal(noise(False, 0), at_start_BLD) and torch.equal(noise(False, 7), at_start_BLD)
    assert not torch.equal(noise(True, 0), at_start_BLD)
    assert not torch.equal(noise(True, 0), noise(True, 1))


@given(st.integers(0, 2**40), st.floats(1e-6, 1))
def test_times_have_a_floor(first: int, t_min: float) -> None:
    x_0_BL = torch.zeros(50, 3, dtype=torch.int64)
    states = noisy_states(0, first + torch.arange(50), x_0_BL, t_min, 9)
    assert (states.t_B >= np.float32(t_min).item()).all() and (states.t_B <= 1).all()
    assert (states.t_B.float().double() == states.t_B).all(), "a row holds them exactly"


def test_pure_masks() -> None:
    states = noisy_states(0, torch.arange(500), torch.zeros(500, 8, dtype=torch.int64), 1.0, 9)
    assert (states.t_B == 1).all() and (states.x_t_BL == 9).all()


def test_laws_of_times_and_masks() -> None:
    """Each p-value above 1e-4: one false alarm in 5,000; the draws are always the same."""
    states = noisy_states(2, torch.arange(20_000), torch.zeros(20_000, 8, dtype=torch.int64), 0.2, 9)
    assert stats.kstest(states.t_B.numpy(), stats.uniform(0.2, 0.8).cdf).pvalue > 1e-4
    counts_B = (states.x_t_BL == 9).sum(-1)
    # Given t the number of masks is binomial; so sum (count - 8 t) is about normal with the binomials' variance.
    z = (counts_B - 8 * states.t_B).sum() / (8 * states.t_B * (1 - states.t_B)).sum().sqrt()
    assert 2 * stats.norm.sf(abs(z.item())) > 1e-4
