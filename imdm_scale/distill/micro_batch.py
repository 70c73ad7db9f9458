"""A micro-batch: some samples of the global batch, corrupted to their times.

Shapes: B batch, L positions, D noise dimensions, N masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.data.stream import TokenStream
from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.schedule import stratified_times
from imdm_scale.model.layer import DropoutKey


@dataclass(frozen=True)
class MicroBatch:
    """What a method's loss is a function of."""

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

    def mask_noise(self, architecture: Architecture) -> Tensor:
        """The noise e of every position, (B, L, D) float32. Drawn when asked for, never stored."""
        return mask_noise(
            self.seed,
            self.sample_ids_B,
            self.step,
            self.x_t_BL.size(1),
            architecture.noise_dim,
            kind=architecture.noise_kind,
            scale=architecture.noise_scale,
        )

    @property
    def dropout_key(self) -> DropoutKey:
        """What dropout in this micro-batch is a function of."""
        return DropoutKey(self.seed, self.step, self.sample_ids_B)

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

    stream: TokenStream
    seed: int
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    sampling_eps: float
    mask_id: int
    device: torch.device

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank computes in one update."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """Micro-batch `index` of this rank in update `step`.

        Sample and time slot go together, so the global batch's samples, times and masks are the same for
        every number of ranks and every micro-batch size.
        """
        first_slot = (index * self.dp_size + self.dp_rank) * self.micro_batch_size
        x_0_BL, sample_ids_B = self.stream.batch(
            step * self.global_batch_size + first_slot, self.micro_batch_size
        )
        t_B = stratified_times(
            self.seed,
            step,
            self.global_batch_size,
            first=first_slot,
            count=self.micro_batch_size,
            sampling_eps=self.sampling_eps,
        )
        x_0_BL, sample_ids_B, t_B = (x.to(self.device) for x in (x_0_BL, sample_ids_B, t_B))
        x_t_BL = corrupt(x_0_BL, t_B, self.mask_id, self.seed, sample_ids_B, step)
        positions_N = (x_t_BL == self.mask_id).flatten().nonzero()[:, 0]
        return MicroBatch(self.seed, step, sample_ids_B, t_B, x_0_BL, x_t_BL, positions_N)
