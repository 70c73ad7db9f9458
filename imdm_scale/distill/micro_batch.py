"""A micro-batch: some samples of the global batch, corrupted to their times.

Shapes: B batch, L positions, D noise dimensions, N masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.data.stream import Stream
from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.schedule import stratified_times
from imdm_scale.distill.replica_stream import ReplicaStream
from imdm_scale.model.layer import DropoutKey
from imdm_scale.parallel.schedule import NetworkInput
from imdm_scale.parallel.transport import Dealing


@dataclass(frozen=True)
class MicroBatch:
    """What a method's loss is a function of. On the CPU: what has a shape that depends on draws is decided there, so
    that no one waits for a GPU."""

    seed: int
    """The run's seed."""
    step: int
    """Index of the update, from 0."""
    sample_ids_B: Tensor
    """Global number of each sample in the run; every draw is keyed by it."""
    t_B: Tensor
    """float64 diffusion times."""
    x_0_BL: Tensor
    """Clean token ids."""
    x_t_BL: Tensor
    """Token ids with the mask id where masked."""
    positions_N: Tensor
    """Row-major indices of the masked positions."""
    counts_B: Tensor
    """Number of masked positions of each sample."""

    def mask_noise(
        self, architecture: Architecture, device: torch.device, rows: slice = slice(None)
    ) -> Tensor:
        """The noise e of every position of some samples, (B, L, D) float32. Drawn when asked for, never stored."""
        return mask_noise(
            self.seed,
            self.sample_ids_B[rows].to(device),
            self.step,
            self.x_t_BL.size(1),
            architecture.noise_dim,
            kind=architecture.noise_kind,
            scale=architecture.noise_scale,
        )

    def network_input(self, architecture: Architecture, device: torch.device) -> NetworkInput:
        """What the network computes from, in training."""
        return NetworkInput(
            self.x_t_BL.to(device),
            lambda: self.mask_noise(architecture, device),
            self.positions_N.to(device),
            DropoutKey(self.seed, self.step, self.sample_ids_B.to(device)),
        )

    @property
    def labels_N(self) -> Tensor:
        """The clean tokens at the masked positions."""
        return self.x_0_BL.flatten()[self.positions_N]

    @property
    def t_N(self) -> Tensor:
        """The time of each masked position's sample."""
        return self.t_B[self.positions_N // self.x_t_BL.size(1)]


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt to micro-batches: by arithmetic on the update and the rank alone."""

    stream: Stream | ReplicaStream
    """Where the blocks come from; of a ReplicaStream only what it has advanced to."""
    seed: int
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    sampling_eps: float
    mask_id: int
    first_sample: int = 0
    """Number in the stream of the first sample of update 0."""

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
        """Have the blocks of updates `step` to `step` + `ahead` at hand. Collective over the replica's ranks."""
        assert isinstance(self.stream, ReplicaStream)
        self.stream.advance(step, ahead)

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """Micro-batch `index` of this rank in update `step`.

        Sample and time slot go together, so the global batch's samples, times and masks are the same for
        every number of ranks and every micro-batch size.
        """
        first_slot = self.dealing.first_slot(self.dp_rank, index)
        first = self.first_sample + step * self.global_batch_size + first_slot
        x_0_BL, sample_ids_B = self.stream.batch(first, self.micro_batch_size)
        t_B = stratified_times(
            self.seed,
            step,
            self.global_batch_size,
            first=first_slot,
            count=self.micro_batch_size,
            sampling_eps=self.sampling_eps,
        )
        return self._corrupted(step, x_0_BL, sample_ids_B, t_B)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """All of this rank's micro-batches of an update."""
        return [self.micro_batch(step, index) for index in range(self.num_micro_batches)]

    def joined(self, step: int) -> MicroBatch:
        """All samples of this rank in an update as one micro-batch."""
        parts = self.micro_batches(step)
        x_0_BL, sample_ids_B, t_B = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("x_0_BL", "sample_ids_B", "t_B")
        )
        return self._corrupted(step, x_0_BL, sample_ids_B, t_B)

    def _corrupted(self, step: int, x_0_BL: Tensor, sample_ids_B: Tensor, t_B: Tensor) -> MicroBatch:
        x_t_BL = corrupt(x_0_BL, t_B, self.mask_id, self.seed, sample_ids_B, step)
        masked_BL = x_t_BL == self.mask_id
        positions_N = masked_BL.flatten().nonzero()[:, 0]
        return MicroBatch(self.seed, step, sample_ids_B, t_B, x_0_BL, x_t_BL, positions_N, masked_BL.sum(-1))
