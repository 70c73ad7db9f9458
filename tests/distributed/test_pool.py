"""The worlds of processes themselves: a test that uses them must not pass, or hang, where a rank fails."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import RankPool


def sum_of_ranks(addend: int) -> float:
    total = torch.tensor(float(dist.get_rank() + addend))
    dist.all_reduce(total)
    return total.item()


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("it went wrong here")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def failure_of(pool: RankPool, case: Any) -> str:
    with pytest.raises(pytest.fail.Exception) as caught:
        pool.run(case, world_size=2)
    return str(caught.value)


def test_results_come_back_by_rank(pool: RankPool) -> None:
    assert pool.run(sum_of_ranks, world_size=1, addend=5) == [5.0]
    assert pool.run(sum_of_ranks, world_size=3, addend=1) == [6.0] * 3


def test_a_failing_rank_fails_the_test_and_the_next_one_runs(pool: RankPool) -> None:
    raised = failure_of(pool, raise_on_rank_1)
    assert "rank 1 of 2" in raised and "it went wrong here" in raised and "raise_on_rank_1" in raised
    assert "exit code 7" in failure_of(pool, die_on_rank_1)
    assert pool.run(sum_of_ranks, world_size=2, addend=0) == [1.0, 1.0]


def test_a_hanging_rank_fails_the_test_with_all_stacks() -> None:
    hung = failure_of(RankPool(time_limit=8.0), hang_on_rank_1)
    assert "no answer after 8.0 s" in hung
    assert "rank 0" in hung and "in barrier" in hung
    assert "rank 1" in hung and "in hang_on_rank_1" in hung
