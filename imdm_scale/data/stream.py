"""The endless stream of training blocks, whose position is one integer.

L integers in a row: the ids of a block, or those of a pair and its key.

Sample i of a run lies in epoch i // num_blocks at place i % num_blocks; which block that is, is
a pure function of (seed, epoch, place). So a run may stop at any sample and go on with another number of processes or
another batch size, and sees the same blocks; a batch that does not fit into an epoch goes on in the next.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from imdm_scale.data.folder import DamagedShard
from imdm_scale.data.order import ShuffleOrder
from imdm_scale.errors import UserError

logger = logging.getLogger(__name__)


class Corpus(Protocol):
    """Blocks of token ids in shards."""

    hash: str
    """Equal exactly where the blocks and their order are equal."""
    length: int
    """Integers in a row."""
    shard_sizes: Sequence[int]
    """Number of blocks of each shard."""
    shuffle_window: int
    """Shards whose blocks are shuffled together."""

    def open_shard(self, index: int) -> np.ndarray:
        """The blocks of a shard (number of blocks, L), memory-mapped; raises DamagedShard."""
        ...

    def prefetch(self, indices: Sequence[int]) -> None:
        """Set about fetching some shards in this order; returns at once."""
        ...

    def shard_name(self, index: int) -> str:
        """How messages call a shard."""
        ...


class ArrayCorpus:
    """Blocks in memory as a corpus of one shard."""

    shuffle_window = 1

    def __init__(self, blocks: np.ndarray) -> None:
        """A corpus of `blocks` (number of blocks, L).

        Raises:
            UserError: there are no blocks.
        """
        if len(blocks) == 0:
            raise UserError(
                "The corpus does not fill one block; give more text in data.path, or shorten the blocks."
            )
        self.blocks = blocks
        self.length = int(blocks.shape[1])
        self.shard_sizes: Sequence[int] = [len(blocks)]
        self.hash = hashlib.sha256(blocks.tobytes()).hexdigest()

    def open_shard(self, index: int) -> np.ndarray:
        """All blocks."""
        return self.blocks

    def prefetch(self, indices: Sequence[int]) -> None:
        """Nothing: they are here."""

    def shard_name(self, index: int) -> str:
        """How messages call it."""
        return "the blocks in memory"


class Stream(ABC):
    """Blocks by their number in the run."""

    data_hash: str
    """Equal exactly where all streams of one seed are equal."""
    seed: int
    """Fixes the order."""
    length: int
    """Integers in a row."""
    num_blocks: int
    """Different blocks."""
    num_replaced: int
    """Samples read so far whose shard was damaged and that were replaced."""

    @abstractmethod
    def fetch(self, samples: np.ndarray) -> Tensor:
        """The blocks of some samples of the run, int64 (number of samples, L).

        Args:
            samples: int64 numbers of samples, quickest where they ascend.

        Raises:
            DamagedShard: a shard cannot be read, and the stream is not to go on without it.
        """

    def batch(self, first_sample: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples first_sample, first_sample + 1, ... of the run.

        Returns:
            Token ids, int64 (count, L), and the samples' numbers, int64 (count,).
        """
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        return self.fetch(samples), torch.from_numpy(samples)


class TokenStream(Stream):
    """The blocks of one corpus in a fresh random order every epoch.

    Args:
        corpus: where the blocks are.
        seed: fixes the order, in [0, 2^64).
        skip_damaged: whether a shard that cannot be read is replaced by another one of its window, and counted,
            instead of ending the run. Which one is a function of the order and of what is damaged.
    """

    def __init__(self, corpus: Corpus, seed: int, skip_damaged: bool = False) -> None:
        self.corpus, self.seed, self.skip_damaged = corpus, seed, skip_damaged
        self.order = ShuffleOrder(corpus.shard_sizes, corpus.shuffle_window, seed)
        self.data_hash, self.length = corpus.hash, corpus.length
        self.num_blocks = self.order.num_blocks
        self.num_replaced = 0
        self.damaged: set[int] = set()
        self._window: tuple[int, int] | None = None
        self._open: dict[int, np.ndarray] = {}

    def fetch(self, samples: np.ndarray) -> Tensor:
        """See `Stream.fetch`."""
        ids = torch.empty((len(samples), self.length), dtype=torch.int64)
        epochs, places = np.divmod(samples, self.num_blocks)
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            windows = self.order.window_of(epoch, places[of_epoch])
            for window in np.unique(windows).tolist():
                of_window = of_epoch[windows == window]
                self._enter(epoch, window)
                shards, rows = self.order.locate(epoch, window, places[of_window])
                for shard in np.unique(shards).tolist():
                    chosen = shards == shard
                    ids.numpy()[of_window[chosen]] = self._read(shard, rows[chosen])
        return ids

    def _enter(self, epoch: int, window: int) -> None:
        """Drop the shards of other windows and set about fetching those of this one and of the next."""
        if self._window == (epoch, window):
            return
        self._window = epoch, window
        windows = self.order.windows(epoch)
        now = windows[window].shards
        self._open = {shard: blocks for shard, blocks in self._open.items() if shard in now}
        following = windows[window + 1] if window + 1 < len(windows) else self.order.windows(epoch + 1)[0]
        absent = [s for s in (*now, *following.shards) if s not in self._open and s not in self.damaged]
        self.corpus.prefetch(absent)

    def _read(self, shard: int, rows: np.ndarray) -> np.ndarray:
        if shard not in self.damaged:
            try:
                if shard not in self._open:
                    self._open[shard] = self.corpus.open_shard(shard)
                return self._open[shard][rows]
            except DamagedShard as error:
                if not self.skip_damaged:
                    raise
                self._give_up(shard, error)
        self.num_replaced += len(rows)
        blocks = self._stand_in(shard)
        return blocks[rows % len(blocks)]

    def _give_up(self, shard: int, error: DamagedShard) -> None:
        self.damaged.add(shard)
        lost = sum(self.corpus.shard_sizes[index] for index in self.damaged)
        logger.warning(
            "SKIPPED DATA: %s Other blocks stand in for its %d blocks; so far %d of %d shards, %.3g%% of all "
            "blocks, are skipped.",
            error,
            self.corpus.shard_sizes[shard],
            len(self.damaged),
            len(self.corpus.shard_sizes),
            100 * lost / self.num_blocks,
        )

    def _stand_in(self, shard: int) -> np.ndarray:
        """The blocks of the next shard of the window that can be read."""
        assert self._window is not None
        epoch, window = self._window
        shards = self.order.windows(epoch)[window].shards
        at = shards.index(shard)
        for other in (*shards[at + 1 :], *shards[:at]):
            if other in self.damaged:
                continue
            try:
                if other not in self._open:
                    self._open[other] = self.corpus.open_shard(other)
                return self._open[other]
            except DamagedShard as error:
                self._give_up(other, error)
        names = ", ".join(map(self.corpus.shard_name, shards))
        raise DamagedShard(
            f"none of the shards that are shuffled together ({names}) can be read, so that none is left to stand "
            "in for the others; mend the folder of data.path (tools/prepare_data.py verify lists what is damaged)."
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_window": None, "_open": {}}
