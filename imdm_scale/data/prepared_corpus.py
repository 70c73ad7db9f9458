"""One split of a prepared folder as what a stream reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imdm_scale.data.folder import PreparedFolder


class PreparedCorpus:
    """A split's shards, on this machine or behind a URL. See `stream.Corpus`."""

    def __init__(self, folder: PreparedFolder, split: str) -> None:
        manifest = folder.manifest
        self.folder, self.shards = folder, manifest.splits[split].shards
        self.hash, self.length = manifest.hash, manifest.row_width
        self.shard_sizes: Sequence[int] = [shard.num_blocks for shard in self.shards]
        self.shuffle_window = manifest.shuffle_window

    def open_shard(self, index: int) -> np.ndarray:
        """The blocks of a shard, memory-mapped; raises DamagedShard."""
        return self.folder.open_shard(self.shards[index])

    def prefetch(self, indices: Sequence[int]) -> None:
        """Set about fetching some shards in this order; returns at once."""
        self.folder.prefetch([self.shards[index] for index in indices])

    def shard_name(self, index: int) -> str:
        """How messages call a shard."""
        return f"{self.folder.url}/{self.shards[index].file}"
