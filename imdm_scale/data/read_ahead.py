"""Blocks in the order in which they will be asked for, read by other processes before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imdm_scale.data.stream import Stream
from imdm_scale.errors import UserError

READER_DIED = "DataLoader worker"
"""How torch's message begins when one of its reading processes is gone."""

Answer = tuple[np.ndarray, int] | UserError


class _Requests(Dataset[Answer]):
    """What a reading process answers: the blocks of some samples, and how many of them were replaced.

    Arrays pass through a pipe in a tenth of the time in which tensors pass through shared memory. A failure is an
    answer too, so that it arrives as it was raised and not wrapped in a traceback.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, samples: np.ndarray) -> Answer:
        before = self.stream.num_replaced
        try:
            ids_BL = self.stream.fetch(samples).numpy()
        except UserError as error:
            return error
        return ids_BL.astype(np.int32), self.stream.num_replaced - before


def _as_it_is(answer: Answer) -> Answer:
    return answer


def read_ahead(
    stream: Stream, requests: Iterable[np.ndarray], workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, int]]:
    """The blocks of each request in order, int64 (number of samples, L), and how many of them were replaced.

    Args:
        requests: numbers of samples, int64; may be endless.
        workers: processes that read, each two requests ahead; with 0 a request is read when it is asked for. The
            blocks do not depend on their number.
        pin_memory: whether the blocks lie in page-locked memory, from which a GPU copies without waiting.

    Raises:
        UserError: as `Stream.fetch`; or a process that reads has died.
    """
    if workers == 0:
        for samples in requests:
            before = stream.num_replaced
            ids_BL = stream.fetch(samples)
            yield ids_BL.pin_memory() if pin_memory else ids_BL, stream.num_replaced - before
        return
    loader = DataLoader(
        _Requests(stream),
        sampler=requests,
        batch_size=None,  # a request is a batch already
        collate_fn=_as_it_is,
        num_workers=workers,
        # Not forked: a copy of this process would hold its connections open after its death.
        multiprocessing_context=get_context("forkserver"),
    )
    try:
        for answer in loader:
            if isinstance(answer, UserError):
                raise answer
            ids_BL, num_replaced = answer
            blocks_BL = torch.empty(ids_BL.shape, dtype=torch.int64, pin_memory=pin_memory)
            yield blocks_BL.copy_(torch.from_numpy(ids_BL)), num_replaced
    except RuntimeError as error:
        if not str(error).startswith(READER_DIED):
            raise
        raise UserError(
            f"one of the {workers} processes that read data ahead is gone ({str(error).splitlines()[0]}); it may have "
            "been killed for memory: lower data.workers, or set it to 0."
        ) from None
