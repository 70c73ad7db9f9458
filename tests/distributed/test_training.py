"""Training by engines over ranks is training by one plain torch process: same losses, norms and weights.

The networks compute in float32 and the reference takes another order of summation. The largest deviations seen are
about a tenth of the bounds (docs/parallelism.md has them all).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.cases import train_small
from tests.distributed.layouts import CASES, SHORT, Case, micro_batches, student, teacher
from tests.distributed.parity import bytes_that_travel, deviation, largest, largest_gap
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, small_config, zero

LOSS, RELATIVE_NORM, WEIGHT = 2e-6, 2e-6, 1e-5
Reference = Callable[..., Outcome]


def run(pool: RankPool, case: Case) -> list[Outcome]:
    """What the student's ranks saw."""
    outcomes = pool.run(train_small, case.world_size, config=case.config, ds_json=zero(case.stage))
    return [outcomes[rank] for rank in case.layout.student.ranks]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_trains_the_same_model(pool: RankPool, reference: Reference, case: Case) -> None:
    expected = reference(*case.what)
    outcomes = run(pool, case)
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses
        assert outcome.grad_norms == outcomes[0].grad_norms
        found = deviation(outcome, expected)
        assert found.loss < LOSS
        assert found.grad_norm < RELATIVE_NORM
        assert found.weight < WEIGHT
        assert found.average < WEIGHT
        assert outcome.transport_bytes == bytes_that_travel(case.config, case.layout)


def test_the_cases_are_different() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("what", sorted({case.what for case in CASES}), ids=" ".join)
def test_the_reference_exercises_what_it_should(reference: Reference, what: tuple[str, ...]) -> None:
    """The gradient is clipped in every update, the average is another network, and each setting has an effect."""
    outcome = reference(*what)
    assert min(outcome.grad_norms) > small_config(*what).train.gradient_clipping
    assert largest_gap(outcome.weights, outcome.average) > 1e-4
    for word in set(what[1:]) - set(SHORT):
        other = reference(*(other for other in what if other != word))
        assert largest(outcome.losses, other.losses) > 1e-4


@pytest.mark.parametrize(("what", "teachers"), [((), 3), (SHORT, 2)])
def test_several_teachers_are_learned_from(what: tuple[str, ...], teachers: int) -> None:
    config = small_config("im_sdtt", *what)
    assert -(-config.train.max_steps // config.method.steps_per_round) == teachers


@pytest.mark.parametrize(
    "case",
    [
        Case(("pretrain", "model.dropout=0.1"), (*student(2, 2), *micro_batches(2), "train.max_steps=4"), 1),
        Case(
            ("im_sdtt", "model.dropout=0.1"),
            (*student(1, 2), *teacher(2), *micro_batches(2, 4), "train.max_steps=4"),
            3,
        ),
    ],
    ids=str,
)
def test_a_layout_repeats_itself_bit_for_bit(pool: RankPool, case: Case) -> None:
    for first, second in zip(run(pool, case), run(pool, case), strict=True):
        assert first.losses == second.losses
        assert first.grad_norms == second.grad_norms
        assert largest_gap(first.weights, second.weights) == 0
        assert largest_gap(first.average, second.average) == 0


@pytest.mark.parametrize(("tp", "pp", "world_size"), [(1, 1, 2), (2, 2, 4)])
def test_bf16_follows_fp32(pool: RankPool, reference: Reference, tp: int, pp: int, world_size: int) -> None:
    expected = reference("pretrain")
    how = (*student(tp, pp), *micro_batches(2), "train.precision=bf16", "train.max_steps=6")
    outcomes = [run(pool, Case(("pretrain",), how, stage, world_size))[0] for stage in range(4)]
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses[:6], rel=5e-3)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms[:6], rel=1e-2)
        if world_size == tp * pp:
            # Without replicas all stages add the same gradients in the same order.
            assert outcome.losses == outcomes[0].losses
            assert outcome.grad_norms == pytest.approx(outcomes[0].grad_norms, rel=1e-6)
            assert largest_gap(outcome.weights, outcomes[0].weights) == 0
