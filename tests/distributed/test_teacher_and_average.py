"""Weights that change hands on their ZeRO shards: the average in the student, the student in the teacher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.distributed.cases import average_in_student, teacher_through_a_refresh
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, Weights, small_config, tensor_parallel, zero
from tests.tiny import plain_network, random_input, tiny

LAYOUTS = [(1, 1, 3), (2, 1, 1), (2, 1, 2), (2, 1, 3), (4, 2, 3)]
"""World size, tensor-parallel size, ZeRO stage."""


def plain_logits(weights: Weights) -> np.ndarray:
    network = plain_network(tiny()).eval()
    network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    ids_BL, noise_BLD = random_input(tiny())
    with torch.no_grad():
        return network(ids_BL, mask_noise=noise_BLD).logits.numpy()


@pytest.mark.parametrize(("world_size", "tp", "stage"), LAYOUTS)
def test_the_average_is_in_the_student_for_a_while(
    pool: RankPool, reference: Callable[..., Outcome], world_size: int, tp: int, stage: int
) -> None:
    config = tensor_parallel(small_config(max_steps=3, learning_rate=1e-2), tp)
    expected = reference(max_steps=3, learning_rate=1e-2)
    own, average = plain_logits(expected.weights), plain_logits(expected.average)
    assert np.abs(own - average).max() > 0.1
    for seen in pool.run(average_in_student, world_size=world_size, config=config, ds_json=zero(stage)):
        assert np.abs(seen["before"] - own).max() < 1e-5
        assert np.abs(seen["inside"] - average).max() < 1e-5
        assert np.array_equal(seen["after"], seen["before"])
        assert seen["shards_swapped_and_restored"].all()


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_weights_come_back_exactly(pool: RankPool, stage: int) -> None:
    config = small_config(max_steps=3, learning_rate=1e-2, precision="bf16")
    for seen in pool.run(average_in_student, world_size=2, config=config, ds_json=zero(stage)):
        assert np.abs(seen["inside"] - seen["before"]).max() > 0.1
        assert np.array_equal(seen["after"], seen["before"])
        assert seen["shards_swapped_and_restored"].all()


@pytest.mark.parametrize(
    ("world_size", "tp", "stage", "precision"),
    [(1, 1, 3, "fp32"), (2, 1, 1, "bf16"), (2, 1, 2, "fp32"), (2, 1, 3, "bf16"), (4, 2, 3, "fp32")],
)
def test_the_teacher_becomes_the_student(
    pool: RankPool, world_size: int, tp: int, stage: int, precision: str
) -> None:
    config = tensor_parallel(small_config(max_steps=2, learning_rate=1e-2, precision=precision), tp)
    for logits in pool.run(
        teacher_through_a_refresh, world_size=world_size, config=config, ds_json=zero(stage)
    ):
        assert np.array_equal(logits["unmoved"], logits["first"])
        assert np.abs(logits["student"] - logits["first"]).max() > 0.1
        assert np.array_equal(logits["taken"], logits["student"])
        assert np.abs(logits["later_student"] - logits["student"]).max() > 0.1
        assert np.array_equal(logits["kept"], logits["taken"])
        assert np.array_equal(logits["loaded"], logits["first"])
