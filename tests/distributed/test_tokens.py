"""Which token is drawn does not depend on how the vocabulary is cut, nor, but for rounding, on how the network is.

Shapes: B batch, L positions, D noise dimensions, N positions with a draw, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.config.tree import Config
from imdm_scale.diffusion.inverse_cdf import inverse_cdf
from imdm_scale.diffusion.likelihood import forbid_mask
from imdm_scale.diffusion.noise import Purpose, mask_noise, uniform
from imdm_scale.diffusion.sampler import draw_tokens
from imdm_scale.model.head import forbid_padding
from imdm_scale.model.placement import padded_vocab_size
from imdm_scale.model.vocabulary import ShardedVocabulary
from tests.distributed.cases import build
from tests.distributed.layouts import student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_config, zero
from tests.tiny import plain_network, tiny

RULES: list[dict[str, Any]] = [{}, {"temperature": 0.6}, {"top_p": 0.7}, {"greedy": True}]
BATCH = 6_400
"""Of 16 positions each: 102,400 draws."""
CHUNK = 640
ROUNDING = 1e-6
"""Of a cumulative probability in float32."""


def logits_and_uniforms(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, V), among which there are ties, and uniforms (N,)."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(3000, tiny().vocab_size, generator=generator)
    logits_NV[::3] = logits_NV[::3].round()
    return logits_NV.to(dtype), torch.rand(3000, generator=generator, dtype=torch.float64)


def tokens_over_shards(dtype: torch.dtype) -> list[np.ndarray]:
    """The tokens of every rule, with the vocabulary over two and over four of four ranks."""
    logits_NV, u_N = logits_and_uniforms(dtype)
    mask_id, vocab_size = tiny().mask_token_id, tiny().vocab_size
    tokens = []
    for size in (2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
        padded = padded_vocab_size(vocab_size, size)
        vocabulary = ShardedVocabulary(groups[dist.get_rank() // size], padded // size)
        wide_NV = torch.nn.functional.pad(logits_NV, (0, padded - vocab_size))
        mine_NV = wide_NV[:, vocabulary.first_id : vocabulary.first_id + padded // size]
        mine_NV = forbid_padding(mine_NV, vocabulary.first_id, vocab_size)
        tokens += [
            draw_tokens(mine_NV, u_N, mask_id=mask_id, vocabulary=vocabulary, **rule).numpy()
            for rule in RULES
        ]
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_logits_give_the_same_tokens_bit_for_bit(pool: RankPool, dtype: torch.dtype) -> None:
    logits_NV, u_N = logits_and_uniforms(dtype)
    whole = [draw_tokens(logits_NV, u_N, mask_id=tiny().mask_token_id, **rule).numpy() for rule in RULES]
    for tokens in pool.run(tokens_over_shards, 4, dtype=dtype):
        assert np.array_equal(tokens, whole + whole)
    assert len({tuple(tokens) for tokens in whole}) == len(RULES)


def first_step() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids (B, L), noise (B, L, D) and uniforms (N,) of a sampler's first step, where all is masked."""
    architecture = tiny()
    for sample_ids_B in torch.arange(BATCH).split(CHUNK):
        ids_BL = torch.full((CHUNK, architecture.length), architecture.mask_token_id)
        noise_BLD = mask_noise(1, sample_ids_B, 0, architecture.length, architecture.noise_dim)
        u_N = uniform(1, sample_ids_B, Purpose.TOKEN, 0, architecture.length, dtype=torch.float64).flatten()
        yield ids_BL, noise_BLD, u_N


def tokens_of_networks(config: Config, ds_json: dict[str, Any]) -> list[np.ndarray]:
    """The student's and the teacher's tokens (N,)."""
    _, parts = build(config, ds_json)
    tokens = []
    for model in (parts.student, parts.teacher):
        assert model is not None
        drawn = [
            model.tokens(ids_BL, lambda rows, e=noise_BLD: e[rows], torch.arange(ids_BL.numel()), u_N)
            for ids_BL, noise_BLD, u_N in first_step()
        ]
        tokens.append(torch.cat(drawn).numpy())
    return tokens


def test_networks_over_ranks_draw_the_same_tokens_but_at_steps_of_the_cdf(pool: RankPool) -> None:
    network = plain_network(tiny()).eval()
    with torch.no_grad():
        logits_NV = torch.cat([network(x, mask_noise=e).logits.flatten(0, 1) for x, e, _ in first_step()])
    logits_NV = forbid_mask(logits_NV, tiny().mask_token_id)
    u_N = torch.cat([u_N for _, _, u_N in first_step()])
    expected = inverse_cdf(logits_NV, u_N).numpy()
    to_step_N = (logits_NV.double().softmax(-1).cumsum(-1) - u_N[:, None]).abs().amin(-1).numpy()

    draws = different = 0
    batch = (f"train.micro_batch_size={CHUNK}", f"train.global_batch_size={CHUNK}")
    for world_size, splits in [(2, student(2) + teacher(1, 2)), (4, student(2, 2) + teacher(4))]:
        config = small_config("im_sdtt", *splits, *batch)
        results = pool.run(tokens_of_networks, world_size, config=config, ds_json=zero(1))
        assert all(np.array_equal(result, results[0]) for result in results)
        for tokens in results[0]:
            is_other_N = tokens != expected
            assert (to_step_N[is_other_N] < ROUNDING).all()
            different += is_other_N.sum()
            draws += len(tokens)
    assert draws > 400_000
    assert different * 100_000 < draws
    # A uniform that is so near a step is rare: the bound above says something.
    assert 0 < (to_step_N < ROUNDING).mean() < 1e-3
