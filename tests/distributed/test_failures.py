"""A rank's failure ends all ranks, soon and with one reason.

"Soon" is 20 s of wall-clock time: here the time is the behaviour under test, for without it the others wait
for the collective operation's time-out of half an hour. They take 1 to 3 s.
"""

from __future__ import annotations

import os
import signal

import pytest

from imdm_scale.errors import UserError
from imdm_scale.parallel.process import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE
from tests.distributed.pool import RankPool

SOON = 20.0
WORLD_SIZE = 3


def program(failing_rank: int, failure: str) -> None:
    """One rank fails while the others wait for it in an all-reduce."""
    from imdm_scale.parallel.process import failures_reported, rank, start_process_group

    with failures_reported():
        import torch
        import torch.distributed as dist

        start_process_group()
        dist.all_reduce(torch.ones(1))
        if rank() == failing_rank:
            if failure == "UserError":
                raise UserError("the setting is wrong.")
            if failure == "RuntimeError":
                raise RuntimeError("the setting is wrong.")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        raise AssertionError("the all-reduce came back although a rank was missing")


def misconfigured() -> None:
    """All ranks see the same mistake before they have met."""
    from imdm_scale.parallel.process import failures_reported

    with failures_reported():
        raise UserError("the setting is wrong.")


def test_a_mistake_that_all_see_is_told_once() -> None:
    ended = RankPool(SOON).launch(misconfigured, WORLD_SIZE)
    assert ended.exit_codes == [USER_ERROR_EXIT_CODE] * WORLD_SIZE
    assert ended.output == "error: the setting is wrong.\n"


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize(
    ("failure", "code"), [("UserError", USER_ERROR_EXIT_CODE), ("RuntimeError", FAILURE_EXIT_CODE)]
)
def test_an_exception_ends_all(failing_rank: int, failure: str, code: int) -> None:
    ended = RankPool(SOON).launch(program, WORLD_SIZE, failing_rank=failing_rank, failure=failure)
    assert ended.exit_codes[failing_rank] == code
    others = [code for rank, code in enumerate(ended.exit_codes) if rank != failing_rank]
    assert others == [FAILURE_EXIT_CODE] * (WORLD_SIZE - 1), ended
    reason = "" if failure == "UserError" else f"rank {failing_rank} failed: RuntimeError: "
    assert ended.output.count("error: ") == ended.output.count(f"error: {reason}the setting is wrong.") == 1
    assert ended.output.count("Traceback") == (0 if failure == "UserError" else 1), ended.output


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_killed_rank_ends_all(failing_rank: int) -> None:
    ended = RankPool(SOON).launch(program, WORLD_SIZE, failing_rank=failing_rank, failure="SIGKILL")
    others = [code for rank, code in enumerate(ended.exit_codes) if rank != failing_rank]
    assert ended.exit_codes[failing_rank] == -signal.SIGKILL
    assert others == [FAILURE_EXIT_CODE] * (WORLD_SIZE - 1), ended
    assert ended.output.count("error: ") == 1, ended.output
