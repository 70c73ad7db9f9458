"""The order of an epoch: a pure function of (seed, epoch), shuffled on two levels.

The shards of a corpus are visited in a random order, `window` of them at a time, and the blocks of a window are
shuffled together. So only the shards of one window need be at hand, and remote reading goes on shard by shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imdm_scale.diffusion.noise import Purpose, uniform

DRAWN_AT_ONCE = 1 << 18
"""Keys drawn in one call: bounds the memory of a window's shuffle."""


@dataclass(frozen=True)
class Window:
    """Some shards of an epoch, whose blocks are visited one after the other in random order."""

    shards: tuple[int, ...]
    """In the order in which they are fetched."""
    first_place: int
    """Place of its first block in the epoch."""
    num_blocks: int
    """Blocks of its shards."""


class ShuffleOrder:
    """Which block stands at which place of which epoch.

    Args:
        shard_sizes: number of blocks of each shard.
        window: shards whose blocks are shuffled together.
        seed: the run's seed, in [0, 2^64).
    """

    def __init__(self, shard_sizes: Sequence[int], window: int, seed: int) -> None:
        self.shard_sizes = np.array(shard_sizes, dtype=np.int64)
        self.first_blocks = np.cumsum(self.shard_sizes) - self.shard_sizes
        self.num_blocks = int(self.shard_sizes.sum())
        self.window, self.seed = window, seed
        self._windows: dict[int, list[Window]] = {}
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch in order."""
        if epoch not in self._windows:
            self._windows = {e: w for e, w in self._windows.items() if e == epoch - 1}  # two meet at a border
            self._windows[epoch] = self._cut(self._draw_shards(epoch))
        return self._windows[epoch]

    def window_of(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Index of the window that holds each place of an epoch, int64."""
        ends = [window.first_place + window.num_blocks for window in self.windows(epoch)]
        return np.searchsorted(ends, places, side="right")

    def locate(self, epoch: int, window: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and row within it, of the blocks at some places of one window of an epoch; int64 each."""
        blocks = self._order(epoch, window)[places - self.windows(epoch)[window].first_place]
        shards = np.searchsorted(self.first_blocks, blocks, side="right") - 1
        return shards, blocks - self.first_blocks[shards]

    def _draw_shards(self, epoch: int) -> np.ndarray:
        shards = np.arange(len(self.shard_sizes))
        return shards[self._by_random_key(shards, Purpose.SHARD_ORDER, epoch)]

    def _cut(self, shards: np.ndarray) -> list[Window]:
        windows, place = [], 0
        for start in range(0, len(shards), self.window):
            inside = shards[start : start + self.window]
            size = int(self.shard_sizes[inside].sum())
            windows.append(Window(tuple(inside.tolist()), place, size))
            place += size
        return windows

    def _order(self, epoch: int, window: int) -> np.ndarray:
        """The blocks of a window, by their number in the corpus, in the order in which they are visited."""
        key = (epoch, window)
        if key not in self._blocks:
            # A batch may span several windows; of the earlier ones the latest may be asked for again.
            self._blocks = dict([*self._blocks.items()][-1:])
            blocks = np.concatenate(
                [
                    self.first_blocks[shard] + np.arange(self.shard_sizes[shard])
                    for shard in self.windows(epoch)[window].shards
                ]
            )
            self._blocks[key] = blocks[self._by_random_key(blocks, Purpose.ORDER, epoch)]
        return self._blocks[key]

    def _by_random_key(self, numbers: np.ndarray, purpose: Purpose, epoch: int) -> np.ndarray:
        """The permutation that sorts `numbers` by a counter-based random key of each."""
        keys = np.concatenate(
            [
                uniform(self.seed, torch.from_numpy(part), purpose, epoch, 1, dtype=torch.float64).numpy()[
                    :, 0, 0
                ]
                for part in np.split(numbers, range(DRAWN_AT_ONCE, len(numbers), DRAWN_AT_ONCE))
            ]
        )
        return np.argsort(keys, kind="stable")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": {}, "_blocks": {}}
