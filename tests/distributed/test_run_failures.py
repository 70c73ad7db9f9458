"""A rank that fails amid training ends the run: soon, with one reason, whatever the others wait in.

As in test_failures.py time is the behaviour under test: without it the others would wait for half an hour.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from imdm_scale.config.layout import run_layout
from imdm_scale.config.tree import Config
from imdm_scale.parallel.process import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE
from tests.distributed.pool import Ended, RankPool
from tests.distributed.small_run import small_config, zero

SOON = 15.0
WORLD_SIZE = 4
STAGE = 3
TEACHER_TIMEOUT = 3.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_an_error() -> None:
    raise LookupError("it went wrong here")


def kill_readers() -> None:
    readers = [p for p in psutil.Process().children(recursive=True) if p.name() == "pt_data_worker"]
    assert readers
    for process in readers:
        process.kill()


def hang() -> None:
    time.sleep(600)


def train_until_one_fails(
    config: Config, failing_rank: int, fail: Callable[[], None], failed_at: Path
) -> None:
    """A run as the training program does it; after its second update `failing_rank` fails."""
    from imdm_scale.parallel.process import (
        end_process_group,
        failures_reported,
        rank,
        set_rank_label,
        start_process_group,
    )

    with failures_reported():
        start_process_group()
        from imdm_scale.distill.loop import serve, train
        from imdm_scale.distill.methods import method_of
        from tests.distributed.cases import build

        layout, parts = build(config, zero(STAGE))
        set_rank_label(layout.label(rank()))
        method = method_of(config.method)
        ends = [end for end in (parts.service, parts.targets) if end is not None]

        def after_update(step: int) -> None:
            if step != 2:
                return
            for end in ends:  # not before: the first updates of a busy machine may take longer
                if end.hand_over.flow_control is not None:
                    end.hand_over.flow_control.timeout = TEACHER_TIMEOUT
            if rank() == failing_rank:
                failed_at.write_text(str(time.monotonic()))
                fail()

        if parts.service is not None:
            serve_one = parts.service.serve

            def serve_and_fail(step: int) -> None:
                serve_one(step)
                after_update(step + 1)

            parts.service.serve = serve_and_fail  # type: ignore[method-assign]
            serve(config, layout, method, parts)
        else:
            train(config, layout, method, parts, lambda update: after_update(update.step))
        end_process_group()


def layout(placement: str, **split: int) -> Config:
    """Six updates in three rounds; the last two of four ranks are the teacher's where it has its own."""
    config = small_config("im_sdtt", micro_batch_size=2)
    config.teacher.placement = placement  # type: ignore[assignment]
    for role in (config.parallel.student, config.parallel.teacher):
        for name, size in split.items():
            setattr(role, name, size)
    return config


def launch(
    tmp_path: Path, config: Config, failing_rank: int, fail: Callable[[], None]
) -> tuple[Ended, list[str], float]:
    """How the run ended, its lines of errors, and seconds from the failure to the end of the last rank."""
    failed_at = tmp_path / "failed_at"
    ended = RankPool().launch(
        train_until_one_fails,
        WORLD_SIZE,
        config=config,
        failing_rank=failing_rank,
        fail=fail,
        failed_at=failed_at,
    )
    assert failed_at.exists(), ended.output
    seconds = time.monotonic() - float(failed_at.read_text())
    return ended, [line for line in ended.output.splitlines() if "error: " in line], seconds


def codes(failing_rank: int, its_code: int) -> list[int]:
    return [its_code if rank == failing_rank else FAILURE_EXIT_CODE for rank in range(WORLD_SIZE)]


LAYOUTS: list[Any] = [
    pytest.param(layout("colocated", pp=2), 0, id="colocated-first-stage"),
    pytest.param(layout("colocated", pp=2), 3, id="colocated-last-stage"),
    pytest.param(layout("disaggregated"), 1, id="disaggregated-student"),
    pytest.param(layout("disaggregated", tp=2), 2, id="disaggregated-teacher"),
]


@pytest.mark.parametrize(("config", "failing_rank"), LAYOUTS)
def test_a_killed_rank_ends_the_run(tmp_path: Path, config: Config, failing_rank: int) -> None:
    ended, errors, seconds = launch(tmp_path, config, failing_rank, die)
    label = run_layout(config, WORLD_SIZE, STAGE).label(failing_rank)
    assert errors == [
        f"error: rank {failing_rank} on {socket.gethostname()} ({label}) ended without a word: "
        "it was killed, or its machine is gone"
    ], ended.output
    assert ended.exit_codes == codes(failing_rank, -signal.SIGKILL)
    assert seconds < SOON


@pytest.mark.parametrize(("config", "failing_rank"), LAYOUTS[1::2])
def test_a_rank_that_raises_ends_the_run(tmp_path: Path, config: Config, failing_rank: int) -> None:
    ended, errors, seconds = launch(tmp_path, config, failing_rank, raise_an_error)
    assert errors == [f"error: rank {failing_rank} failed: LookupError: it went wrong here"], ended.output
    assert ended.output.count("Traceback") == 1 and "in raise_an_error" in ended.output
    assert ended.exit_codes == codes(failing_rank, FAILURE_EXIT_CODE)
    assert seconds < SOON


def test_a_killed_reading_process_ends_the_run(tmp_path: Path) -> None:
    config = layout("colocated", tp=2)
    config.data.workers = 1
    ended, errors, seconds = launch(tmp_path, config, 2, kill_readers)
    assert len(errors) == 1 and re.match(
        r"error: one of the 1 processes that read data ahead is gone \(DataLoader worker",
        errors[0],
    ), ended.output
    assert "Traceback" not in ended.output
    assert ended.exit_codes == codes(2, USER_ERROR_EXIT_CODE)
    assert seconds < 2 * SOON  # what had been read ahead is used up first, and torch looks every five seconds


@pytest.mark.parametrize(
    ("split", "failing_rank", "sentence"),
    [
        # Either shard may be first to say so: the other teacher's rank waits for the one that hangs.
        (
            {"tp": 2},
            2,
            r"the teacher \(rank [23]\) has not announced update 2 for 3 s, and the student \(rank [01]\) ",
        ),
        (
            {"pp": 2},
            1,
            r"the student \(rank 1\) has not consumed update 2 for 3 s, and the teacher \(rank 3\)",
        ),
    ],
    ids=["teacher", "student"],
)
def test_a_side_that_lags_is_named(
    tmp_path: Path, split: dict[str, int], failing_rank: int, sentence: str
) -> None:
    ended, errors, seconds = launch(tmp_path, layout("disaggregated", **split), failing_rank, hang)
    assert len(errors) == 1 and re.match(f"error: {sentence}", errors[0]), ended.output
    assert "Traceback" not in ended.output
    # Its peers may see the same at the same time; one of them tells it.
    assert {USER_ERROR_EXIT_CODE} < set(ended.exit_codes) <= {USER_ERROR_EXIT_CODE, FAILURE_EXIT_CODE}
    assert seconds < TEACHER_TIMEOUT + SOON
