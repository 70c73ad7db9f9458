"""States that were made beforehand, together with the text to which a teacher led each.

Shapes: B batch, L positions, W integers in a row of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.data.pairs import unpack_pairs
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.pair_generation import own_times
from imdm_scale.distill.states import StateSource


class StoredPairs(StateSource):
    """Rows of a folder of pairs (`imdm_scale.data.pairs`) as they are, with the noise that their sampler began with.

    Args:
        architecture: of the network.
        seed: of the pairs.
        fresh_noise: whether each update draws the noise anew. A teacher without noise leaves nothing in the stored one
            that could be learned, only memorised.
    """

    def __init__(self, architecture: Architecture, seed: int, fresh_noise: bool = False) -> None:
        self.architecture, self.seed, self.fresh_noise = architecture, seed, fresh_noise

    def micro_batch(
        self, seed: int, step: int, rows_BW: Tensor, sample_ids_B: Tensor, t_B: Tensor
    ) -> MicroBatch:
        """See `StateSource.micro_batch`; the times are those of the pairs."""
        x_t_BL, x_0_BL, times_B, numbers_B = map(torch.from_numpy, unpack_pairs(rows_BW.numpy()))
        noise_of = (seed, sample_ids_B, step) if self.fresh_noise else (self.seed, numbers_B, 0)
        return MicroBatch(
            seed=seed,
            step=step,
            sample_ids_B=sample_ids_B,
            t_B=times_B.double(),
            x_0_BL=x_0_BL,
            x_t_BL=x_t_BL,
            reveal_BL=own_times(self.seed, numbers_B, x_t_BL.shape[1]),
            masked_BL=x_t_BL == self.architecture.mask_token_id,
            noise_seed=noise_of[0],
            noise_ids_B=noise_of[1],
            noise_step=noise_of[2],
        )
