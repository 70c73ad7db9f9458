"""Weights that change hands on their ZeRO shards: the average in the student, the student in the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.cases import average_in_student, teacher_through_a_refresh
from tests.distributed.layouts import Case, micro_batches, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, Weights, zero
from tests.tiny import plain_network, random_input, tiny

MORE = ("train.learning_rate=1e-2", "train.max_steps=3")
"""Updates enough for the networks to differ by far."""
AVERAGES = [
    Case(("pretrain", *MORE), student(), 3, world_size=1),
    Case(("pretrain", *MORE), student(1, 2), 0, world_size=2),
    Case(("pretrain", *MORE), student(2, 1, True), 2, world_size=4),
    Case(("pretrain", *MORE), student(2, 2), 3, world_size=4),
]
BF16 = "train.precision=bf16"
REFRESHES = [
    Case(("im_sdtt", *MORE), student() + teacher(), 3, world_size=1),
    Case(("im_sdtt", *MORE, BF16), student() + teacher(), 3, world_size=2),
    Case(("im_sdtt", *MORE, BF16), student(1, 2) + teacher(1, 2), 0, world_size=2),
    Case(("im_sdtt", *MORE), student(1, 2) + teacher() + micro_batches(2), 3, world_size=4),
    Case(("im_sdtt", *MORE), (*student(2, 2), *teacher(2), "teacher.zero_stage=3"), 0, world_size=4),
]


def plain_logits(weights: Weights) -> np.ndarray:
    network = plain_network(tiny()).eval()
    network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    ids_BL, noise_BLD = random_input(tiny())
    with torch.no_grad():
        return network(ids_BL, mask_noise=noise_BLD).logits.numpy()


def run(pool: RankPool, act: Callable[..., Any], case: Case) -> list[dict[str, np.ndarray]]:
    return pool.run(act, case.world_size, config=case.config, ds_json=zero(case.stage))


@pytest.mark.parametrize("case", AVERAGES, ids=str)
def test_the_average_is_in_the_student_for_a_while(
    pool: RankPool, reference: Callable[..., Outcome], case: Case
) -> None:
    expected = reference(*case.what)
    own, average = plain_logits(expected.weights), plain_logits(expected.average)
    assert np.abs(own - average).max() > 0.1
    for seen in run(pool, average_in_student, case):
        assert np.abs(seen["before"] - own).max() < 1e-5
        assert np.abs(seen["inside"] - average).max() < 1e-5
        assert np.array_equal(seen["after"], seen["before"])
        assert seen["shards_swapped_and_restored"].all()


@pytest.mark.parametrize(("split", "stage"), [(student(), 1), (student(), 3), (student(1, 2), 0)])
def test_bf16_weights_come_back_exactly(pool: RankPool, split: tuple[str, ...], stage: int) -> None:
    for seen in run(pool, average_in_student, Case(("pretrain", *MORE, BF16), split, stage, world_size=2)):
        assert np.abs(seen["inside"] - seen["before"]).max() > 0.1
        assert np.array_equal(seen["after"], seen["before"])
        assert seen["shards_swapped_and_restored"].all()


@pytest.mark.parametrize("case", REFRESHES, ids=str)
def test_the_teacher_becomes_the_student(pool: RankPool, case: Case) -> None:
    for logits in run(pool, teacher_through_a_refresh, case):
        assert np.array_equal(logits["unmoved"], logits["first"])
        assert np.abs(logits["student"] - logits["first"]).max() > 0.1
        assert np.array_equal(logits["taken"], logits["student"])
        assert np.abs(logits["later_student"] - logits["student"]).max() > 0.1
        assert np.array_equal(logits["kept"], logits["taken"])
        assert np.array_equal(logits["loaded"], logits["first"])
