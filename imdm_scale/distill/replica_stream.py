"""The blocks of one replica of a network: one of its ranks reads them, the others receive them from it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.data.read_ahead import read_ahead
from imdm_scale.data.stream import Stream
from imdm_scale.parallel.transport import Dealing


class ReplicaStream:
    """The blocks of a data-parallel replica, an update at a time, for all of its tensor- and pipeline-parallel ranks.

    `advance` is collective over the replica and comes at the same point of the program on all of its ranks; what has
    been advanced to is then answered from memory, in any order.

    Args:
        stream: all blocks of the run; only the replica's first rank reads it.
        dealing: which sample of an update goes to which replica.
        dp_rank: this replica.
        first_sample: number in the stream of the run's first sample.
        first_step: the first update that is asked for.
        replica: the replica's ranks, over CPU memory; None where it is one rank.
        workers: processes that read ahead.
        pin_memory: whether the blocks lie in page-locked memory.
    """

    def __init__(
        self,
        stream: Stream,
        dealing: Dealing,
        dp_rank: int,
        *,
        first_sample: int = 0,
        first_step: int = 0,
        replica: dist.ProcessGroup | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dealing, self.first_sample, self.replica = dealing, first_sample, replica
        self.length = stream.length
        self.slots = np.array(dealing.slots(dp_rank), dtype=np.int64)
        self.pin_memory = pin_memory
        self.num_replaced = 0
        """Samples that this rank has read and whose shard was damaged."""
        self._next_step = first_step
        self._updates: dict[int, Tensor] = {}
        self._reader = None
        if replica is None or replica.rank() == 0:
            self._reader = read_ahead(stream, self._requests(first_step), workers, pin_memory)

    def advance(self, step: int, ahead: int = 0) -> None:
        """Have the blocks of updates `step` to `step` + `ahead` at hand, and let go of those before."""
        self._updates = {s: ids_BL for s, ids_BL in self._updates.items() if s >= step}
        for coming in range(self._next_step, step + ahead + 1):
            self._updates[coming] = self._receive()
        self._next_step = max(self._next_step, step + ahead + 1)

    def batch(self, first_sample: int, count: int) -> tuple[Tensor, Tensor]:
        """Neighbouring samples of one micro-batch: token ids, int64 (count, L), and the samples' numbers (count,)."""
        step, slot = divmod(first_sample - self.first_sample, self.dealing.global_batch_size)
        row = int(np.searchsorted(self.slots, slot))
        return self._updates[step][row : row + count], torch.arange(first_sample, first_sample + count)

    def _requests(self, first_step: int) -> Iterator[np.ndarray]:
        first = self.first_sample + first_step * self.dealing.global_batch_size
        while True:
            yield first + self.slots
            first += self.dealing.global_batch_size

    def _receive(self) -> Tensor:
        ids_BL = None
        if self._reader is not None:
            ids_BL, num_replaced = next(self._reader)
            self.num_replaced += num_replaced
        if self.replica is None:
            assert ids_BL is not None
            return ids_BL
        # Vocabularies are below 2^31: half the bytes.
        shape = len(self.slots), self.length
        sent_BL = torch.empty(shape, dtype=torch.int32) if ids_BL is None else ids_BL.to(torch.int32)
        dist.broadcast(sent_BL, group_src=0, group=self.replica)
        if ids_BL is None:
            ids_BL = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory).copy_(sent_BL)
        return ids_BL
