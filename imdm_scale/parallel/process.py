"""Starting and ending the processes of a run: one rank's failure ends all, its reason printed once."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta

# Before torch is loaded: when a rank fails, the others' broken connections would each print a C++ stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist

from imdm_scale.errors import UserError
from imdm_scale.parallel.compat import default_store, prepare_libraries

USER_ERROR_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EFBIG)
"""Errors of the operating system that are the user's to mend: the disk is full, or not for this user to write."""
FAILURE_KEY = "imdm_scale/failures"
WATCH_SECONDS = 0.5
"""How often a rank looks whether another has failed."""
LINGER_SECONDS = 4 * WATCH_SECONDS
"""How long rank 0, which hosts the store, outlives its failure, so that all others see it."""


def world_size() -> int:
    """Number of processes of this run, as the launcher says (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank, as the launcher says."""
    return int(os.environ.get("RANK", "0"))


def start_process_group(timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Join the run's processes: NCCL where CUDA is present, gloo elsewhere.

    Without a launcher the process is a world of its own.

    Returns:
        This rank's device.
    """
    prepare_libraries()
    import deepspeed

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend, device = "nccl", torch.device("cuda", local_rank)
    else:
        backend, device = "gloo", torch.device("cpu")
        # The processes of one machine share its cores; more threads than cores only wait for one another.
        # torchrun says their number in the first of these names, DeepSpeed's launcher in the second.
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(here)))
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    _Watch.start()
    return device


def end_process_group() -> None:
    """Leave together, so that no rank tears down what another still uses."""
    if dist.is_initialized():
        _Watch.stop()
        dist.barrier()
        dist.destroy_process_group()


class _Watch:
    """A thread on every rank that ends the process when another rank has failed.

    A rank that waits in a collective operation for one that is gone would otherwise wait for the time-out.
    """

    thread: threading.Thread | None = None
    ended = threading.Event()

    @classmethod
    def start(cls) -> None:
        cls.ended.clear()
        store = default_store().clone()
        cls.thread = threading.Thread(target=cls._run, args=(store,), daemon=True)
        cls.thread.start()

    @classmethod
    def stop(cls) -> None:
        cls.ended.set()
        if cls.thread is not None:
            cls.thread.join()
            cls.thread = None

    @classmethod
    def _run(cls, store: dist.Store) -> None:
        while not cls.ended.wait(WATCH_SECONDS):
            try:
                failed = store.check([FAILURE_KEY])
            except (RuntimeError, dist.DistError):
                if cls.ended.is_set():
                    return
                _report_lost_store()
                failed = True
            if failed and not cls.ended.is_set():
                _leave(FAILURE_EXIT_CODE)


def _report_lost_store() -> None:
    # The store lives in rank 0, which is gone without a word. One of the others says so for all.
    if rank() == 1:
        print(
            "error: rank 0 ended without a word: it was killed, or its machine is gone",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """End the process on an exception: exit code 2 for the user's mistakes, 1 for everything else.

    The first rank that fails prints the reason; the ranks that fail because it went away end silently.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave(FAILURE_EXIT_CODE)
    except BaseException as error:
        sentence = _sentence_for_user(error)
        if sentence is not None:
            if _is_first_to_fail():
                print(f"error: {sentence}", file=sys.stderr, flush=True)
            _leave(USER_ERROR_EXIT_CODE)
        if isinstance(error, SystemExit):
            raise
        if _is_first_to_fail():
            traceback.print_exc()
            print(
                f"error: rank {rank()} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True
            )
        _leave(FAILURE_EXIT_CODE)


def _sentence_for_user(error: BaseException) -> str | None:
    """What to tell where the user can mend it; None where the traceback is needed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        place = error.filename or "a file of this run"
        return f"{place} could not be written ({error.strerror}); free space or set run_dir to another place."
    return None


def _is_first_to_fail() -> bool:
    """Whether this rank is the one to tell why. Ends the watch, which would cut the telling short."""
    _Watch.ended.set()
    if not dist.is_initialized():
        # Mostly a mistake that all ranks see alike; but a file may be missing on one node only.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return default_store().add(FAILURE_KEY, 1) == 1
    except (RuntimeError, dist.DistError):
        _report_lost_store()
        return False


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if rank() == 0 and world_size() > 1 and dist.is_initialized():
        time.sleep(LINGER_SECONDS)
    # Not sys.exit: interpreter shutdown would wait for collectives that can no longer complete.
    os._exit(code)
