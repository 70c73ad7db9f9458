"""The endless stream of training blocks, whose position is one integer.

B batch, L length. Sample i of a run lies in epoch i // num_blocks at place i % num_blocks; the order within
an epoch is a pure function of (seed, epoch), so that a run may stop at any sample and go on with another
number of processes or another batch size, and sees the same blocks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.errors import UserError


class TokenStream:
    """Blocks in a fresh random order every epoch."""

    def __init__(self, blocks: np.ndarray, seed: int) -> None:
        """A stream over `blocks` (num_blocks, L) of token ids, shuffled by `seed`.

        Raises:
            UserError: there are no blocks.
        """
        if len(blocks) == 0:
            raise UserError(
                "The corpus does not fill one block; give more text in data.path, or shorten the blocks."
            )
        self.blocks = blocks
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a batch spans two epochs at their border

    def _draw_order(self, epoch: int) -> np.ndarray:
        """The order of the blocks in `epoch`, int64 (num_blocks,): sorted by counter-based noise."""
        ids = torch.arange(len(self.blocks))
        keys = uniform(self.seed, ids, Purpose.ORDER, epoch, 1, dtype=torch.float64).flatten()
        return torch.argsort(keys, stable=True).numpy()

    def batch(self, first_sample: int, count: int, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Samples first_sample, first_sample + stride, ... of the run.

        Returns:
            Token ids, int64 (count, L), and the samples' numbers in the run, int64 (count,).
        """
        samples = first_sample + stride * np.arange(count, dtype=np.int64)
        epochs, places = np.divmod(samples, len(self.blocks))
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            rows[of_epoch] = self._order(int(epoch))[places[of_epoch]]
        ids_BL = torch.from_numpy(self.blocks[rows].astype(np.int64))
        return ids_BL, torch.from_numpy(samples)
