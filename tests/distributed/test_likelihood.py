"""The likelihood bound over ranks against a plain loop; samples drawn in pieces.

L positions, S sequences, K draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from imdm_scale.config.tree import Config
from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.diffusion.schedule import stratified_times
from imdm_scale.distill.likelihood import SAMPLING_EPS, nelbo_of_draw, summary
from imdm_scale.distill.sampling import sample_texts
from tests.distributed.cases import build
from tests.distributed.layouts import Case, student
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_architecture, small_blocks, small_config, zero
from tests.tiny import plain_network, tiny

NUM_BLOCKS, NUM_DRAWS, SEED = 13, 3, 6
CASES = [
    Case(("pretrain",), student(), 1, world_size=1),
    Case(("pretrain",), student(), 3, world_size=2),
    Case(("pretrain",), student(2, 2), 1, world_size=4),
]


def draws_and_pieces(config: Config, ds_json: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Bounds (S,) by each draw at several batch sizes; texts at once and in two pieces, with and without prefixes."""
    _, parts = build(config, ds_json)
    model = parts.student
    assert model is not None
    bounds = [
        nelbo_of_draw(model, small_blocks()[:NUM_BLOCKS], batch_size, SEED, draw, NUM_DRAWS)
        for batch_size in (2, 5, 100)
        for draw in range(NUM_DRAWS)
    ]
    prefixes_SP = torch.arange(2, 2 + 7 * 3).reshape(7, 3)

    def texts(count: int, **given: Any) -> np.ndarray:
        return sample_texts(model, SamplerSettings(3), count, 2, 5, 1, **given).numpy()

    pieces = [
        texts(7),
        np.concatenate([texts(4), texts(3, first_sample=4)]),
        texts(7, prefixes_SP=prefixes_SP),
        np.concatenate(
            [
                texts(2, prefixes_SP=prefixes_SP[:2]),
                texts(5, prefixes_SP=prefixes_SP[2:], first_sample=2),
            ]
        ),
    ]
    return bounds, pieces


def plain_bounds() -> np.ndarray:
    """(K, S) by the plain network, one sequence at a time, in the order in which they are visited."""
    architecture = small_architecture(small_config())
    network = plain_network(architecture).eval()
    stream = TokenStream(ArrayCorpus(small_blocks()[:NUM_BLOCKS]), SEED)
    found = np.zeros((NUM_DRAWS, NUM_BLOCKS))
    for draw in range(NUM_DRAWS):
        within_S = stratified_times(SEED, draw, NUM_BLOCKS, sampling_eps=0.0)
        for s in range(NUM_BLOCKS):
            x_0_1L, ids_1 = stream.batch(s, 1)
            t_1 = SAMPLING_EPS + (1 - SAMPLING_EPS) * (draw + within_S[s : s + 1]) / NUM_DRAWS
            x_t_1L = corrupt(x_0_1L, t_1, architecture.mask_token_id, SEED, ids_1, draw)
            noise_1LD = mask_noise(SEED, ids_1, draw, architecture.length, architecture.noise_dim)
            with torch.no_grad():
                logits_LV = network(x_t_1L, mask_noise=noise_1LD).logits[0].double()
            logits_LV[:, architecture.mask_token_id] = -torch.inf
            nll_L = -logits_LV.log_softmax(-1).gather(1, x_0_1L[0, :, None])[:, 0]
            masked_L = x_t_1L[0] == architecture.mask_token_id
            found[draw, s] = (nll_L[masked_L].sum() / t_1 / architecture.length).item()
    return found


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """See `plain_bounds`."""
    return plain_bounds()


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> list[np.ndarray]:
    """Texts of one rank."""
    return pool.run(draws_and_pieces, 1, config=small_config(), ds_json=zero(1))[0][1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sequence_counts_once(
    pool: RankPool, reference: np.ndarray, alone: list[np.ndarray], case: Case
) -> None:
    """Thirteen blocks in batches that thirteen is no multiple of, over ranks."""
    results = pool.run(draws_and_pieces, case.world_size, config=case.config, ds_json=zero(case.stage))
    allowed = 1 if case.layout.student.tp > 1 else 0  # a draw may fall on the other side of a border
    for bounds, pieces in results:
        for index, nelbo_S in enumerate(bounds):
            assert nelbo_S == pytest.approx(reference[index % NUM_DRAWS], rel=1e-4)
        for texts_SL, expected_SL in zip(pieces, alone, strict=True):
            assert (texts_SL != expected_SL).any(axis=1).sum() <= allowed


def test_pieces_are_the_whole(alone: list[np.ndarray]) -> None:
    once, in_pieces, continued, continued_in_pieces = alone
    assert (once == in_pieces).all() and (once[:, 0] == 1).all()
    assert (continued == continued_in_pieces).all()
    assert (continued[:, :3] == np.arange(2, 23).reshape(7, 3)).all()
    assert continued.max() < tiny().mask_token_id


def test_the_error_is_that_of_a_mean_over_sequences(reference: np.ndarray) -> None:
    found = summary(reference)
    assert found.nelbo == pytest.approx(reference.mean())
    by_hand = np.sqrt(sum((m - reference.mean()) ** 2 for m in reference.mean(axis=0)) / 12 / 13)
    assert found.standard_error == pytest.approx(by_hand)
    assert (found.num_sequences, found.num_draws) == (13, 3)
    assert summary(reference[:, :1]).standard_error is None
