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
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from imdm_scale.parallel.compat import prepare_libraries

PRELOAD = ["pytest", "imdm_scale.checkpoint.save", "imdm_scale.distill.loop", "imdm_scale.distill.sampling"]


class RankPool:
    """Runs functions on worlds of any size. The functions are top-level, so that they can be pickled.

    Args:
        time_limit: seconds after which a case is ended; every rank's stack is then shown.
    """

    def __init__(self, time_limit: float = 120.0) -> None:
        self.time_limit = time_limit
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def run(self, case: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
        """What `case(**arguments)` returned on each rank; the test fails where a rank does not return."""
        with tempfile.TemporaryDirectory() as folder:
            pipes = [self.context.Pipe(duplex=False) for _ in range(world_size)]
            ranks = [
                self.context.Process(
                    target=_run_rank, args=(rank, world_size, folder, sender, case, arguments)
                )
                for rank, (_, sender) in enumerate(pipes)
            ]
            for process, (_, sender) in zip(ranks, pipes, strict=True):
                process.start()
                sender.close()
            try:
                return self._results([receiver for receiver, _ in pipes], ranks, Path(folder))
            finally:
                for process in ranks:
                    process.kill()
                    process.join()

    def _results(self, receivers: list[Connection], ranks: list[Any], folder: Path) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.time_limit
        while len(results) < len(ranks):
            waiting = [receivers[rank] for rank in range(len(ranks)) if rank not in results]
            ready = wait(waiting, timeout=deadline - time.monotonic())
            if not ready:
                pytest.fail(f"no answer after {self.time_limit} s:\n{_stacks(ranks, folder)}", pytrace=False)
            for receiver in ready:
                rank = receivers.index(receiver)
                try:
                    results[rank], failure = receiver.recv()
                except EOFError:
                    ranks[rank].join()
                    failure = f"ended without a word, exit code {ranks[rank].exitcode}"
                if failure:
                    pytest.fail(f"rank {rank} of {len(ranks)}: {failure}", pytrace=False)
        return [results[rank] for rank in range(len(ranks))]


def _stacks(ranks: list[Any], folder: Path) -> str:
    """Where every rank stands."""
    for process in ranks:
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)
    return "\n".join(f"rank {path.name}\n{path.read_text()}" for path in sorted(folder.glob("[0-9]*")))


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    case: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    stacks = (Path(folder) / str(rank)).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    try:
        prepare_libraries()
        import deepspeed

        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=5),
        )
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        answer = (case(**arguments), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    sender.send(answer)
    if answer[1] is None:
        dist.barrier()
    os._exit(0)  # the case is over; there is nothing that the libraries' exit handlers need do
