"""A rank's failure ends all ranks, soon and with one reason.

"Soon" is 15 s of wall-clock time: here the time is the behaviour under test, for without it the others wait
for the collective operation's time-out of half an hour. They take 1 to 3 s.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch.distributed as dist

from imdm_scale.errors import UserError
from imdm_scale.parallel import liveness
from imdm_scale.parallel.liveness import Liveness
from imdm_scale.parallel.process import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE
from tests.distributed.pool import Ended, RankPool

SOON = 15.0
WORLD_SIZE = 3
ERRORS = {"UserError": UserError, "LookupError": LookupError, "RuntimeError": RuntimeError}
KILLED = "it was killed, or its machine is gone"


def fail(failing_rank: int, error: str) -> None:
    """One rank raises while the others wait for it in an all-reduce."""
    from imdm_scale.parallel.process import failures_reported, rank, start_process_group

    with failures_reported():
        import torch

        start_process_group()
        dist.all_reduce(torch.ones(1))
        if rank() == failing_rank:
            raise ERRORS[error]("the setting is wrong.")
        dist.all_reduce(torch.ones(1))
        raise AssertionError("the all-reduce came back although a rank was missing")


def die(
    killed_rank: int, waiting: str, labels: list[str] | None = None, leaves_a_child: bool = False
) -> None:
    """One rank is killed; the others wait for it, or in something that it has no part in."""
    from imdm_scale.parallel.compat import default_store
    from imdm_scale.parallel.process import failures_reported, rank, set_rank_label, start_process_group

    with failures_reported():
        import torch

        start_process_group()
        if labels:
            set_rank_label(labels[rank()])
        dist.all_reduce(torch.ones(1))
        if rank() == killed_rank:
            if leaves_a_child and os.fork() == 0:
                time.sleep(SOON + 5)
                os._exit(0)
            if waiting == "with an error":
                time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if waiting == "for the killed rank":
            dist.all_reduce(torch.ones(1))
        if waiting == "for a third rank":
            receiver, sleeper = (other for other in range(WORLD_SIZE) if other != killed_rank)
            if rank() == receiver:
                dist.recv(torch.ones(1), src=sleeper)
        if waiting == "for a key":
            default_store().get("a key that nobody sets")
        if waiting == "with an error":
            raise RuntimeError("the connection is broken, which is seen before the death that is the reason")
        time.sleep(2 * SOON)


def end_at_different_times(late_rank: int) -> None:
    """No rank fails; one comes late to the end."""
    from imdm_scale.parallel.process import (
        end_process_group,
        failures_reported,
        rank,
        set_rank_label,
        start_process_group,
    )

    with failures_reported():
        start_process_group()
        set_rank_label("a part of the run")
        if rank() == late_rank:
            time.sleep(0.5)
        end_process_group()
        if rank() == late_rank:
            time.sleep(0.5)


def misconfigured() -> None:
    """All ranks see the same mistake before they have met."""
    from imdm_scale.parallel.process import failures_reported

    with failures_reported():
        raise UserError("the setting is wrong.")


def others_exit_codes(ended: Ended, but: int) -> list[int | None]:
    return [code for rank, code in enumerate(ended.exit_codes) if rank != but]


def test_a_mistake_that_all_see_is_told_once() -> None:
    ended = RankPool(SOON).launch(misconfigured, WORLD_SIZE)
    assert ended.exit_codes == [USER_ERROR_EXIT_CODE] * WORLD_SIZE
    assert ended.output == "error: the setting is wrong.\n"


@pytest.mark.parametrize(
    ("failing_rank", "error", "code"),
    [
        (0, "UserError", USER_ERROR_EXIT_CODE),
        (1, "UserError", USER_ERROR_EXIT_CODE),
        (0, "LookupError", FAILURE_EXIT_CODE),
        (1, "RuntimeError", FAILURE_EXIT_CODE),
    ],
)
def test_an_exception_ends_all(failing_rank: int, error: str, code: int) -> None:
    ended = RankPool(SOON).launch(fail, WORLD_SIZE, failing_rank=failing_rank, error=error)
    assert ended.exit_codes[failing_rank] == code
    assert others_exit_codes(ended, but=failing_rank) == [FAILURE_EXIT_CODE] * (WORLD_SIZE - 1), ended
    reason = "" if error == "UserError" else f"rank {failing_rank} failed: {error}: "
    assert ended.output.count("error: ") == ended.output.count(f"error: {reason}the setting is wrong.") == 1
    assert ended.output.count("Traceback") == (0 if error == "UserError" else 1), ended.output


@pytest.mark.parametrize(
    ("killed_rank", "waiting"),
    [
        (0, "for the killed rank"),
        (1, "for the killed rank"),
        (0, "for a third rank"),
        (1, "for a third rank"),
        (2, "for a third rank"),
        (2, "for a key"),
        (0, "with an error"),
        (2, "with an error"),
    ],
)
def test_a_killed_rank_ends_all_and_is_named(killed_rank: int, waiting: str) -> None:
    ended = RankPool(SOON).launch(die, WORLD_SIZE, killed_rank=killed_rank, waiting=waiting)
    assert ended.exit_codes[killed_rank] == -signal.SIGKILL
    assert others_exit_codes(ended, but=killed_rank) == [FAILURE_EXIT_CODE] * (WORLD_SIZE - 1), ended
    assert (
        ended.output
        == f"error: rank {killed_rank} on {socket.gethostname()} ended without a word: {KILLED}\n"
    )


@pytest.mark.parametrize("killed_rank", [0, 2])
def test_a_killed_rank_is_named_with_its_label(killed_rank: int) -> None:
    ended = RankPool(SOON).launch(
        die,
        WORLD_SIZE,
        killed_rank=killed_rank,
        waiting="for a third rank",
        labels=["student", "student", "teacher: stage 0"],
    )
    label = "student" if killed_rank == 0 else "teacher: stage 0"
    assert ended.output.startswith(f"error: rank {killed_rank} on {socket.gethostname()} ({label}) ended")


def test_a_killed_rank_is_missed_though_its_child_lives() -> None:
    ended = RankPool(SOON).launch(
        die, WORLD_SIZE, killed_rank=1, waiting="for a third rank", leaves_a_child=True
    )
    assert others_exit_codes(ended, but=1) == [FAILURE_EXIT_CODE] * (WORLD_SIZE - 1), ended
    assert ended.output.count("error: ") == ended.output.count("error: rank 1 on ") == 1


@pytest.mark.parametrize("late_rank", [0, 2])
def test_an_end_in_good_order_is_silent(late_rank: int) -> None:
    ended = RankPool(SOON).launch(end_at_different_times, WORLD_SIZE, late_rank=late_rank)
    assert ended.exit_codes == [0] * WORLD_SIZE
    assert ended.output == ""


def watch(rank: int, world_size: int) -> Liveness:
    return Liveness(rank, world_size, on_loss=sys.exit, on_failure=sys.exit)


def test_a_rank_that_cannot_reach_rank_0_says_so() -> None:
    store = dist.HashStore()
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        port = not_listening.getsockname()[1]
        store.set(liveness.PORT_KEY, str(port))
        with pytest.raises(UserError, match=rf"rank 2 on .* rank 0 at 127\.0\.0\.1, port {port} .*refused"):
            watch(2, WORLD_SIZE).start(store, "127.0.0.1")


def test_rank_0_says_which_ranks_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "CONNECT_SECONDS", 0.5)
    store = dist.HashStore()
    other = threading.Thread(target=watch(2, 4).start, args=(store, "127.0.0.1"))
    other.start()
    with pytest.raises(UserError, match=r"rank 0 on .* waited .* for ranks \[1, 3\], which did not connect"):
        watch(0, 4).start(store, "127.0.0.1")
    other.join()
