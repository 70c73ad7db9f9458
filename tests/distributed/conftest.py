"""The worlds of processes, and the runs that they are measured against."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, plain_run, small_config


@pytest.fixture(scope="session")
def pool() -> RankPool:
    """Runs a function on a world of processes: `results = pool.run(case, world_size=2, ...)`."""
    return RankPool()


@pytest.fixture(scope="session")
def reference() -> Callable[..., Outcome]:
    """`plain_run` of `small_config` with the given arguments, done once for each."""
    return cache(lambda *arguments: plain_run(small_config(*arguments)))
