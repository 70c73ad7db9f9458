"""Dropout that depends on what is dropped, not on where it is computed.

Shapes: S positions, B batch, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imdm_scale.model.layer import DropoutAdd, DropoutKey
from imdm_scale.model.stage import ImdmStage
from tests.tiny import plain_network, random_input, tiny, weights_of

PROBABILITY = 0.1


def dropped(sample_ids: list[int], seed: int = 1, step: int = 0, site: int = 0) -> Tensor:
    """What the operation makes of ones added to zeros, for samples of 50 positions of width 40."""
    add = DropoutAdd(num_sites=4)
    add.site = site
    add.key = DropoutKey(seed, step, torch.tensor(sample_ids))
    ones_SBH = torch.ones(50, len(sample_ids), 40)
    return add(training=True, fused=False)((ones_SBH, None), torch.zeros_like(ones_SBH), PROBABILITY)


def test_a_sample_has_its_mask_in_any_batch() -> None:
    whole_SBH = dropped([7, 8, 9, 10])
    assert torch.equal(torch.cat([dropped([7]), dropped([8, 9]), dropped([10])], dim=1), whole_SBH)
    assert torch.equal(dropped([10, 8]), whole_SBH[:, [3, 1]])


def test_the_kept_are_scaled_and_as_many_as_they_should_be() -> None:
    kept_SBH = dropped(list(range(100))) != 0
    assert (dropped([0, 1]).unique() == torch.tensor([0.0, 1 / (1 - PROBABILITY)])).all()
    # 200,000 draws: a right rate is 5 standard errors off with a chance of 6e-7.
    error = math.sqrt(PROBABILITY * (1 - PROBABILITY) / kept_SBH.numel())
    assert abs(kept_SBH.float().mean().item() - (1 - PROBABILITY)) < 5 * error


def test_sites_steps_seeds_and_samples_have_masks_of_their_own() -> None:
    masks = [dropped([0]), dropped([1]), dropped([0], seed=2)]
    masks += [dropped([0], step=step, site=site) for step in (0, 1) for site in range(4)][1:]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            # Independent masks of 2,000 agree in 82% of the places; 5 standard errors are 4.3%.
            assert abs((first == second).float().mean().item() - 0.82) < 0.043


def test_a_shard_of_the_sequence_has_its_part_of_the_mask() -> None:
    key = DropoutKey(1, 0, torch.tensor([7, 8]))
    shards = []
    for rank in range(5):
        add = DropoutAdd(num_sites=4, sequence_rank=rank)
        add.key = key
        ones_SBH = torch.ones(10, 2, 40)
        shards.append(
            add(training=True, fused=False)((ones_SBH, None), torch.zeros_like(ones_SBH), PROBABILITY)
        )
    assert torch.equal(torch.cat(shards), dropped([7, 8]))


def test_the_residual_is_not_dropped() -> None:
    add = DropoutAdd()
    add.key = DropoutKey(1, 0, torch.tensor([0]))
    x_SBH, residual_SBH = torch.full((50, 1, 40), 0.9), torch.full((50, 1, 40), 3.0)
    out_SBH = add(training=True, fused=False)((x_SBH, None), residual_SBH, PROBABILITY)
    assert torch.allclose(out_SBH.unique(), torch.tensor([3.0, 4.0]))


def test_evaluation_drops_nothing(build_stage: Callable[..., ImdmStage]) -> None:
    weights = weights_of(plain_network(tiny()))
    ids_BL, noise_BLD = random_input(tiny())
    positions_N = torch.arange(ids_BL.numel())
    without_NV = build_stage(tiny(dropout=0.0), weights)(ids_BL, noise_BLD, positions_N)
    assert torch.equal(build_stage(tiny(dropout=0.3), weights)(ids_BL, noise_BLD, positions_N), without_NV)


def test_a_training_network_needs_the_key_and_follows_it(build_stage: Callable[..., ImdmStage]) -> None:
    stage = build_stage(tiny(dropout=0.3), weights_of(plain_network(tiny()))).train()
    ids_BL, noise_BLD = random_input(tiny(), batch=4)
    length = ids_BL.size(1)
    with pytest.raises(AssertionError, match="dropout key"):
        stage(ids_BL, noise_BLD, torch.arange(1))

    def logits(samples: slice, step: int = 3) -> Tensor:
        ids = torch.arange(20, 24)[samples]
        positions_N = torch.arange(len(ids) * length)
        return stage(ids_BL[samples], noise_BLD[samples], positions_N, DropoutKey(1, step, ids))

    whole_NV = logits(slice(0, 4))
    parts_NV = torch.cat([logits(slice(0, 1)), logits(slice(1, 4))])
    assert (parts_NV - whole_NV).abs().max() < 1e-5
    assert (logits(slice(0, 4), step=4) - whole_NV).abs().max() > 0.1
