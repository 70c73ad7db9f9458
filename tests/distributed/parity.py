"""How far a run by engines over ranks is from the run by one plain process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imdm_scale.config.layout import RunLayout
from imdm_scale.config.tree import Config
from tests.distributed.small_run import Outcome, Weights, small_plan
from tests.tiny import tiny


@dataclass(frozen=True)
class Deviation:
    """The largest over all updates or elements."""

    loss: float
    grad_norm: float
    """Relative."""
    weight: float
    average: float
    """Of the EMA's weights."""


def deviation(outcome: Outcome, expected: Outcome) -> Deviation:
    """Of one rank's outcome from the plain run's."""
    return Deviation(
        largest(outcome.losses, expected.losses),
        largest(np.divide(outcome.grad_norms, expected.grad_norms), np.ones(len(expected.grad_norms))),
        largest_gap(outcome.weights, expected.weights),
        largest_gap(outcome.average, expected.average),
    )


def largest(values: Sequence[float] | np.ndarray, expected: Sequence[float] | np.ndarray) -> float:
    """The largest difference."""
    assert len(values) == len(expected)
    return float(np.abs(np.subtract(values, expected)).max())


def largest_gap(weights: Weights, expected: Weights) -> float:
    """The largest difference of an element."""
    assert weights.keys() == expected.keys()
    return max(largest(weights[name].ravel(), expected[name].ravel()) for name in expected)


def rows_that_travel(config: Config, layout: RunLayout) -> list[int]:
    """Hidden states that reach the student's ranks from other ranks, in each update.

    Each rank of the student's last stage needs the rows of its replica's samples. It has those for which it is on
    the last stage of the teacher's replica.
    """
    if layout.teacher is None:
        return [0] * config.train.max_steps
    plan = small_plan(config)
    rows = []
    for step in range(config.train.max_steps):
        total = 0
        for slot, count in enumerate(plan.micro_batch(step, 0).counts_B.tolist()):
            has, needs = (
                {
                    role.rank_at(role.pp - 1, slot // role.micro_batch_size % role.dp, tp)
                    for tp in range(role.tp)
                }
                for role in (layout.teacher, layout.student)
            )
            total += count * len(needs - has)
        rows.append(total)
    return rows


def bytes_that_travel(config: Config, layout: RunLayout) -> list[int]:
    """`rows_that_travel` in bytes: hidden states in float32, or token ids in int64."""
    row = 8 if config.method.name == "coupled" else tiny().hidden_size * 4
    return [rows * row for rows in rows_that_travel(config, layout)]
