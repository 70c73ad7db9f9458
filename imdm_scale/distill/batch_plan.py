"""How a global batch is dealt to micro-batches: by arithmetic on the update and the rank alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from imdm_scale.data.stream import Stream
from imdm_scale.diffusion.schedule import stratified_times
from imdm_scale.distill.micro_batch import MicroBatch, join
from imdm_scale.distill.replica_stream import ReplicaStream
from imdm_scale.distill.states import StateSource
from imdm_scale.parallel.transport import Dealing


@dataclass(frozen=True)
class Visited:
    """Texts that a network wrote on the way to the states of an update. G slots of the update's global batch."""

    step: int
    ids_GL: Tensor
    """int64; read where the state is not masked."""
    chosen_G: Tensor
    """bool: whose states these are; the others' come from the data."""


@dataclass
class BatchPlan:
    """The micro-batches of one role's rank."""

    stream: Stream | ReplicaStream
    """Where the rows come from; of a ReplicaStream only what it has advanced to."""
    states: StateSource
    """What becomes of them."""
    seed: int
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    sampling_eps: float
    first_sample: int = 0
    """Number in the stream of the first sample of update 0."""
    visited: Visited | None = field(default=None, init=False)
    """States of one update that a network has visited, where the method wants such."""

    @property
    def dealing(self) -> Dealing:
        """Which sample goes where."""
        return Dealing(self.global_batch_size, self.micro_batch_size, self.dp_size)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank computes in one update."""
        return self.dealing.num_micro_batches

    @property
    def num_replaced(self) -> int:
        """Samples that this rank has read and for which others stood in, their shard being damaged."""
        return self.stream.num_replaced

    def advance(self, step: int, ahead: int = 0) -> None:
        """Have the rows of updates `step` to `step` + `ahead` at hand. Collective over the replica's ranks."""
        assert isinstance(self.stream, ReplicaStream)
        self.stream.advance(step, ahead)

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """Micro-batch `index` of this rank in update `step`.

        Sample and time slot go together, so the global batch's samples, times and masks are the same for
        every number of ranks and every micro-batch size.
        """
        first_slot = self.dealing.first_slot(self.dp_rank, index)
        slots = slice(first_slot, first_slot + self.micro_batch_size)
        first = self.first_sample + step * self.global_batch_size + first_slot
        rows_BW, sample_ids_B = self.stream.batch(first, self.micro_batch_size)
        t_B = stratified_times(
            self.seed,
            step,
            self.global_batch_size,
            first=first_slot,
            count=self.micro_batch_size,
            sampling_eps=self.sampling_eps,
        )
        micro_batch = self.states.micro_batch(self.seed, step, rows_BW, sample_ids_B, t_B)
        if self.visited is None or self.visited.step != step:
            return micro_batch
        return micro_batch.visiting(self.visited.ids_GL[slots], self.visited.chosen_G[slots])

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """All of this rank's micro-batches of an update."""
        return [self.micro_batch(step, index) for index in range(self.num_micro_batches)]

    def joined(self, step: int) -> MicroBatch:
        """All samples of this rank in an update as one micro-batch."""
        return join(self.micro_batches(step))

    def sample_ids(self, step: int) -> Tensor:
        """Numbers of the samples of an update's global batch, (G,)."""
        return self.first_sample + step * self.global_batch_size + torch.arange(self.global_batch_size)
