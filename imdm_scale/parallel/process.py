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
from typing import NoReturn

# Before torch is loaded: when a rank fails, the others' broken connections would each print a C++ stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist

from imdm_scale.errors import UserError
from imdm_scale.parallel.compat import default_store, prepare_libraries
from imdm_scale.parallel.liveness import Liveness, Peer

USER_ERROR_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EFBIG)
"""Errors of the operating system that are the user's to mend: the disk is full, or not for this user to write."""
FAILURE_KEY = "imdm_scale/failures"
CONSEQUENCE_SECONDS = 3.0
"""How long an error that may be the consequence of another rank's death is held back."""
TELLING_SECONDS = 5.0
"""How long a rank that tells why it fails is left alone when others end."""
LINGER_SECONDS = 1.0
"""How long rank 0, which hosts the store, outlives its failure, so that all others see it."""

_failures: dist.Store | None = None
"""Counts the ranks that have failed."""
_liveness: Liveness | None = None
_ending = threading.Lock()


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

    Raises:
        UserError: the ranks cannot reach one another.
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
    global _failures, _liveness
    # A connection of its own: the default store's is busy while another thread waits for a key.
    _failures = default_store().clone()
    _liveness = Liveness(rank(), world_size(), on_loss=_end_for_loss, on_failure=_end_silently)
    _liveness.start(default_store(), os.environ["MASTER_ADDR"])
    return device


def set_rank_label(label: str) -> None:
    """Say what this rank does in the run, e.g. "teacher: stage 0, shard 1": it is told with the rank's death."""
    if _liveness is not None:
        _liveness.set_label(label)


def end_process_group() -> None:
    """Leave together, so that no rank tears down what another still uses."""
    global _failures, _liveness
    if dist.is_initialized():
        dist.barrier()
        if _liveness is not None:
            _liveness.say_goodbye()
        _failures = _liveness = None
        dist.destroy_process_group()


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """End the process on an exception: exit code 2 for the user's mistakes, 1 for everything else.

    The first rank that fails prints the reason, and a rank that is gone without a word is named for it; all
    others end silently within seconds, whatever they wait in.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end(FAILURE_EXIT_CODE, f"error: rank {rank()} was interrupted")
    except BaseException as error:
        sentence = _sentence_for_user(error)
        if sentence is not None:
            _end(USER_ERROR_EXIT_CODE, f"error: {sentence}")
        if isinstance(error, SystemExit):
            raise
        if isinstance(error, RuntimeError) and world_size() > 1:
            # What every backend raises when a peer is gone. If that is why, the watching thread is about to
            # end this process: the reason to tell is the peer's death.
            time.sleep(CONSEQUENCE_SECONDS)
        _end(
            FAILURE_EXIT_CODE,
            f"{traceback.format_exc()}error: rank {rank()} failed: {type(error).__name__}: {error}",
        )


def _sentence_for_user(error: BaseException) -> str | None:
    """What to tell where the user can mend it; None where the traceback is needed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        place = error.filename or "a file of this run"
        return f"{place} could not be written ({error.strerror}); free space or set run_dir to another place."
    return None


def _end_for_loss(lost: Peer) -> NoReturn:
    _end(
        FAILURE_EXIT_CODE,
        f"error: {lost} ended without a word: it was killed, or its machine is gone",
        is_rank_0_gone=lost.rank == 0,
    )


def _end_silently() -> NoReturn:
    _end(FAILURE_EXIT_CODE)


def _end(code: int, reason: str = "", is_rank_0_gone: bool = False) -> NoReturn:
    """End this process and with it all others, after telling the reason if no other rank has told one."""
    _ending.acquire(timeout=TELLING_SECONDS)  # for ever: of two threads that want to end, one does
    try:
        if reason and (_speaks_without_rank_0() if is_rank_0_gone else _is_first_to_fail()):
            print(reason, file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:  # where the output cannot be written, too
        if _liveness is not None:
            _liveness.announce_failure()
            if rank() == 0 and world_size() > 1:
                time.sleep(LINGER_SECONDS)
        # Not sys.exit: interpreter shutdown would wait for collectives that can no longer complete.
        os._exit(code)


def _is_first_to_fail() -> bool:
    if _failures is None:
        # Mostly a mistake that all ranks see alike; but a file may be missing on one node only.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _failures.add(FAILURE_KEY, 1) == 1
    except RuntimeError:  # the store is gone, and rank 0 with it
        return _speaks_without_rank_0()


def _speaks_without_rank_0() -> bool:
    # The ranks cannot agree on one without the store: one of each machine speaks.
    return rank() == 1 or os.environ.get("LOCAL_RANK") == "0"
