"""Worlds of real processes for the tests: a function runs on every rank, the results come back.

A fork server imports the heavy libraries once (10 s); every case then runs in fresh processes that are forked
from it in milliseconds. So no case sees what an earlier one left behind (DeepSpeed keeps its process groups
in globals), and one that fails or hangs cannot harm the next.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

PRELOAD = [
    "imdm_scale.parallel.process",  # the first, as in a run: it sets what torch reads when it is loaded
    "pytest",
    "imdm_scale.checkpoint.save",
    "imdm_scale.distill.loop",
    "imdm_scale.distill.sampling",
    "tests.distributed.probed",
]
"""Imported once, by the fork server. There is one for all tests of a process, also for those that fork readers of
data, so what it imports must be said before the first of them (tests/conftest.py)."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    exit_codes: list[int | None]
    """By rank; negative is a signal's number, None a rank that had to be ended by the test."""
    seconds: float
    """Until the last rank ended, from the time when all ranks had begun."""
    output: str
    """Everything that the ranks printed, in order."""


class RankPool:
    """Runs functions on worlds of any size.

    Args:
        time_limit: seconds after which a case is ended; every rank's stack is then shown.
    """

    def __init__(self, time_limit: float = 120.0) -> None:
        self.time_limit = time_limit
        self.context = multiprocessing.get_context("forkserver")

    def run(self, case: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
        """What `case(**arguments)` returned on each rank; the test fails where a rank does not return.

        Args:
            case: a top-level function; a gloo process group exists when it is called. Its arguments and
                result travel as pickles, so tensors should travel as arrays.
        """
        with tempfile.TemporaryDirectory() as folder:
            pipes = [self.context.Pipe() for _ in range(world_size)]
            ranks = [
                self.context.Process(
                    target=_run_rank, args=(rank, world_size, folder, theirs, case, arguments)
                )
                for rank, (_, theirs) in enumerate(pipes)
            ]
            try:
                for process, (_, theirs) in zip(ranks, pipes, strict=True):
                    process.start()
                    theirs.close()
                return self._results([ours for ours, _ in pipes], ranks, Path(folder))
            finally:
                _end(ranks)

    def _results(self, pipes: list[Connection], ranks: list[Any], folder: Path) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.time_limit
        while len(results) < len(ranks):
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"no answer after {self.time_limit} s\n{_stacks(ranks, folder)}", pytrace=False)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.index(pipe)
                try:
                    results[rank], failure = pipe.recv()
                except EOFError:
                    ranks[rank].join()
                    failure = f"ended without a word, exit code {ranks[rank].exitcode}"
                if failure:
                    pytest.fail(f"rank {rank} of {len(ranks)}: {failure}", pytrace=False)
        return [results[rank] for rank in range(len(ranks))]

    def launch(self, program: Callable[..., None], world_size: int, **arguments: Any) -> Ended:
        """Run `program(**arguments)` on ranks that only have a launcher's environment, until all have ended."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            output.touch()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            ranks = [
                self.context.Process(
                    target=_launch_rank, args=(rank, world_size, port, output, program, arguments)
                )
                for rank in range(world_size)
            ]
            try:
                for process in ranks:
                    process.start()
                begun = time.monotonic()
                for process in ranks:
                    process.join(max(0.0, begun + self.time_limit - time.monotonic()))
                seconds = time.monotonic() - begun
                return Ended([process.exitcode for process in ranks], seconds, output.read_text())
            finally:
                _end(ranks)


def _end(ranks: list[Any]) -> None:
    for process in ranks:
        if process.pid is not None:
            process.kill()
            process.join()


def _stacks(ranks: list[Any], folder: Path) -> str:
    """Where every rank stands."""
    for process in ranks:
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)  # the ranks write while this process waits
    return "\n".join(f"rank {path.name}\n{path.read_text()}" for path in sorted(folder.glob("[0-9]*")))


def _set_environment(rank: int, world_size: int) -> None:
    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    pipe: Connection,
    case: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    stacks = (Path(folder) / str(rank)).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    _set_environment(rank, world_size)
    try:
        import deepspeed
        import torch
        import torch.distributed as dist

        from imdm_scale.parallel.compat import prepare_libraries

        torch.set_num_threads(1)
        prepare_libraries()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=3),
        )
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        result = case(**arguments)
        dist.barrier()
        pipe.send((result, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    try:
        pipe.recv()  # until the test ends this process, or is itself gone
    except EOFError:
        os._exit(0)


def _launch_rank(
    rank: int,
    world_size: int,
    port: int,
    output: Path,
    program: Callable[..., None],
    arguments: dict[str, Any],
) -> None:
    _set_environment(rank, world_size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    program(**arguments)
