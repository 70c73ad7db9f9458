"""Starting and ending the processes of a run: one rank's failure ends all, its reason printed once."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from imdm_scale.errors import UserError
from imdm_scale.parallel.compat import default_store, prepare_libraries

USER_ERROR_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1


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
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return device


def end_process_group() -> None:
    """Leave together, so that no rank tears down what another still uses."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """End the process on an exception: exit code 2 for the user's mistakes, 1 for everything else.

    The first rank that fails prints the reason; the ranks that fail because it went away end silently.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave(FAILURE_EXIT_CODE)
    except UserError as error:
        if _is_first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(USER_ERROR_EXIT_CODE)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if _is_first_to_fail():
            traceback.print_exc()
            print(
                f"error: rank {rank()} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True
            )
        _leave(FAILURE_EXIT_CODE)


def _is_first_to_fail() -> bool:
    if not dist.is_initialized():
        return rank() == 0
    try:
        return default_store().add("imdm_scale/failures", 1) == 1
    except (RuntimeError, dist.DistError):
        # The store lives in rank 0. It is gone, so rank 0 ended first, without a word if it was killed.
        print(f"error: rank {rank()} lost contact with rank 0", file=sys.stderr, flush=True)
        return False


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: interpreter shutdown would wait for collectives that can no longer complete.
    os._exit(code)
