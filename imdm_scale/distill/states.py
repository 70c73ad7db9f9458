"""Where the noisy states x_t of a batch come from: data that are corrupted, or couplings that were made beforehand.

Shapes: B batch, L positions, W integers in a row of the stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.coupling import corrupt_coupled
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.schedule import EPS0
from imdm_scale.distill.micro_batch import MicroBatch


class StateSource(ABC):
    """Rows of the stream to micro-batches."""

    @abstractmethod
    def micro_batch(
        self, seed: int, step: int, rows_BW: Tensor, sample_ids_B: Tensor, t_B: Tensor
    ) -> MicroBatch:
        """The states of some samples in update `step`.

        Args:
            t_B: float64, the times that the update has for these samples.
        """


class CorruptedData(StateSource):
    """Each position of a clean text is masked by itself with probability 1 - alpha(t); fresh noise in every update.

    Args:
        architecture: of the networks.
        coupled: whether the positions' times are those in their own noise (`diffusion.coupling`), not draws apart.
    """

    def __init__(self, architecture: Architecture, coupled: bool = False) -> None:
        self.architecture, self.coupled = architecture, coupled

    def micro_batch(
        self, seed: int, step: int, rows_BW: Tensor, sample_ids_B: Tensor, t_B: Tensor
    ) -> MicroBatch:
        """See `StateSource.micro_batch`."""
        mask_id, length = self.architecture.mask_token_id, rows_BW.shape[1]
        clean = MicroBatch(
            seed=seed,
            step=step,
            sample_ids_B=sample_ids_B,
            t_B=t_B,
            x_0_BL=rows_BW,
            x_t_BL=rows_BW,
            reveal_BL=torch.zeros(rows_BW.shape, dtype=torch.float64),
            masked_BL=torch.zeros(rows_BW.shape, dtype=torch.bool),
            noise_seed=seed,
            noise_ids_B=sample_ids_B,
            noise_step=step,
        )
        if self.coupled:
            reveal_BL = clean.coordinates(self.architecture).tau
            x_t_BL = corrupt_coupled(rows_BW, reveal_BL, t_B, mask_id)
        else:
            u_BL = uniform(seed, sample_ids_B, Purpose.MASK, step, length, dtype=torch.float64)[..., 0]
            reveal_BL = u_BL / (1.0 - EPS0)  # masked where u < 1 - alpha(t) = (1 - EPS0) t
            x_t_BL = corrupt(rows_BW, t_B, mask_id, seed, sample_ids_B, step)
        return replace(clean, reveal_BL=reveal_BL, x_t_BL=x_t_BL, masked_BL=x_t_BL == mask_id)
