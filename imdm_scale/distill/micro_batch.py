"""A micro-batch: some samples of the global batch, corrupted to their times.

Shapes: B batch, L positions, D noise dimensions, N masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.coupling import Coordinates, coordinates
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.model.layer import DropoutKey
from imdm_scale.parallel.schedule import NetworkInput


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
    reveal_BL: Tensor
    """float64 times: a position is masked where its own lies below t, so the one of the largest is revealed first."""
    masked_BL: Tensor
    """bool."""
    noise_seed: int
    """With the two below it names the noise e of the masks."""
    noise_ids_B: Tensor
    noise_step: int

    def mask_noise(
        self, architecture: Architecture, device: torch.device, rows: slice = slice(None)
    ) -> Tensor:
        """The noise e of every position of some samples, (B, L, D) float32. Drawn when asked for, never stored."""
        return mask_noise(
            self.noise_seed,
            self.noise_ids_B[rows].to(device),
            self.noise_step,
            self.x_t_BL.size(1),
            architecture.noise_dim,
            kind=architecture.noise_kind,
            scale=architecture.noise_scale,
        )

    def coordinates(self, architecture: Architecture) -> Coordinates:
        """The uniforms u and tau in that noise, (B, L) on the CPU."""
        two = replace(architecture, noise_dim=2)
        return coordinates(
            self.mask_noise(two, torch.device("cpu")), architecture.noise_kind, architecture.noise_scale
        )

    def network_input(self, architecture: Architecture, device: torch.device) -> NetworkInput:
        """What the network computes from, in training."""
        return NetworkInput(
            self.x_t_BL.to(device),
            lambda: self.mask_noise(architecture, device),
            self.positions_N.to(device),
            DropoutKey(self.seed, self.step, self.sample_ids_B.to(device)),
        )

    def visiting(self, ids_BL: Tensor, chosen_B: Tensor) -> MicroBatch:
        """The same times, masks and noise, but where `chosen_B` the unmasked tokens are those of `ids_BL`."""
        visited_BL = ids_BL.where(~self.masked_BL, self.x_t_BL)
        return replace(self, x_t_BL=visited_BL.where(chosen_B[:, None], self.x_t_BL))

    @property
    def positions_N(self) -> Tensor:
        """Row-major indices of the masked positions."""
        return self.masked_BL.flatten().nonzero()[:, 0]

    @property
    def counts_B(self) -> Tensor:
        """Number of masked positions of each sample."""
        return self.masked_BL.sum(-1)

    @property
    def labels_N(self) -> Tensor:
        """The clean tokens at the masked positions."""
        return self.x_0_BL.flatten()[self.positions_N]

    @property
    def t_N(self) -> Tensor:
        """The time of each masked position's sample."""
        return self.t_B[self.positions_N // self.x_t_BL.size(1)]

    @property
    def reveal_N(self) -> Tensor:
        """The masked positions' own times."""
        return self.reveal_BL.flatten()[self.positions_N]


def join(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of one update as one."""
    return replace(
        parts[0],
        **{
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(MicroBatch)
            if isinstance(getattr(parts[0], field.name), Tensor)
        },
    )
