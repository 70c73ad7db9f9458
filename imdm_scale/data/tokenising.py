"""Texts to compact arrays of token ids, by this process or by several beside it, in order.

Each worker process has a pipe of its own, served by a thread of this process. So nothing is shared between workers:
when one is killed, whatever it was doing, its pipe ends, and its thread sees that at once. (In a ProcessPoolExecutor
all results pass one pipe, and a worker that is killed while it writes there leaves half a message, for whose other half
the pool waits for ever.) When this process dies, the workers' pipes end as well, and so do they.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock

import numpy as np

from imdm_scale.data.packing import BLANK
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

BATCHES_PER_WORKER = 2
"""Batches in flight for each worker: the one that it works on, and one that waits for it or for its turn."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one split of a corpus."""

    split: str
    first: int
    """Number of the first row in the split."""
    texts: list[str]


@dataclass(frozen=True)
class Tokens:
    """What became of `Rows`."""

    ids_N: np.ndarray
    """The rows' token ids one after another."""
    lengths_R: np.ndarray
    """int64, number of ids of each row; `BLANK` for a text of white space."""


def tokenise(tokenizer: Tokenizer, rows: Rows, dtype: str) -> Tokens:
    """The token ids, of type `dtype`, of some rows.

    Raises:
        UserError: the tokenizer refuses a text.
    """
    documents = {number: text for number, text in enumerate(rows.texts) if text and not text.isspace()}
    try:
        encoded = tokenizer.encode_batch(list(documents.values()))
    except Exception as error:
        number, reason = _refused(tokenizer, documents, error)
        raise UserError(
            f"Document {rows.first + number} of the {rows.split} split (counted from 0) cannot be tokenised "
            f"({type(reason).__name__}: {reason}); mend or remove it, then give the same command again."
        ) from None
    lengths_R = np.full(len(rows.texts), BLANK, dtype=np.int64)
    lengths_R[list(documents)] = lengths = [len(ids) for ids in encoded]
    return Tokens(np.fromiter(chain.from_iterable(encoded), dtype, sum(lengths)), lengths_R)


def _refused(tokenizer: Tokenizer, documents: dict[int, str], error: Exception) -> tuple[int, Exception]:
    """Which of a batch's documents the tokenizer refuses, and why; the first where none is refused alone."""
    for number, text in documents.items():
        try:
            tokenizer.encode_batch([text])
        except Exception as reason:
            return number, reason
    return next(iter(documents)), error


class TokenisingPool:
    """Tokenises in several processes; with one worker in this process alone. A context manager."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, workers: int) -> None:
        """Starts the processes, which need about a second until they work.

        Args:
            tokenizer: is sent to each process once, pickled.
            dtype: NumPy's name of the ids' type.
            workers: processes; 1: none but this one.
        """
        self._tokenizer, self._dtype = tokenizer, dtype
        self._workers = [_Worker(tokenizer, dtype) for _ in range(workers)] if workers > 1 else []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "tokenising")
        self._lock = Lock()
        self._death: UserError | None = None

    def __enter__(self) -> TokenisingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def map(self, batches: Iterable[Rows]) -> Iterator[Tokens]:
        """`tokenise` of each of `batches`, in order. Two batches a worker are read ahead.

        Raises:
            UserError: as `tokenise`; or a worker process died.
        """
        if not self._workers:
            yield from (tokenise(self._tokenizer, rows, self._dtype) for rows in batches)
            return
        in_flight: deque[Future[Tokens]] = deque()
        for rows in batches:
            in_flight.append(self._threads.submit(self._ask_a_worker, rows))
            if len(in_flight) == BATCHES_PER_WORKER * len(self._workers):
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()

    def _ask_a_worker(self, rows: Rows) -> Tokens:
        """Runs in a thread; there are as many threads as workers, so that one is idle."""
        worker = self._idle.get()
        try:
            answer = worker.ask(rows)
        except (EOFError, OSError):
            raise self._dead(worker) from None
        finally:
            self._idle.put(worker)  # a dead one too, of which the next batch learns at once
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _dead(self, worker: _Worker) -> UserError:
        """Ends all workers, so that nobody waits for them, and names the death that was seen first."""
        with self._lock:
            if self._death is None:
                worker.process.join()
                code = worker.process.exitcode or 0
                how = (
                    f"was killed by signal {-code}, as happens when memory runs out"
                    if code < 0
                    else f"ended with exit code {code}, for the reason that it printed"
                )
                self._death = UserError(
                    f"One of the {len(self._workers)} worker processes {how}; what is finished is kept: give the same "
                    "command again to go on, perhaps with fewer workers."
                )
                for other in self._workers:
                    other.process.kill()
            return self._death


class _Worker:
    """A process that tokenises, and this process' end of the pipe to it."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process' threads
        self._first_message: tuple[Tokenizer, str] | None = (tokenizer, dtype)
        self.connection, their_end = context.Pipe()
        self.process = context.Process(target=_work, args=(their_end,), daemon=True)
        # Ctrl-C reaches all processes of a terminal. A process inherits what is blocked when it is started: the workers
        # never see the interrupt, and this process, which does, ends them.
        resource_tracker.ensure_running()  # which unblocks them, when a first process starts it
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        their_end.close()

    def ask(self, rows: Rows) -> Tokens | UserError:
        """Sends one batch and waits for the answer.

        Raises:
            EOFError, OSError: the process is dead.
        """
        if (
            self._first_message is not None
        ):  # not at the start: a pipe holds less than a tokenizer and would wait
            self.connection.send(self._first_message)
            self._first_message = None
        self.connection.send(rows)
        return self.connection.recv()


def _work(connection: Connection) -> None:
    """A worker's life: a tokenizer, then batch after batch, until the other end of the pipe is closed."""
    with suppress(EOFError, OSError):
        tokenizer, dtype = connection.recv()
        while True:
            rows = connection.recv()
            answer: Tokens | UserError
            try:
                answer = tokenise(tokenizer, rows, dtype)
            except UserError as error:
                answer = error
            connection.send(answer)
