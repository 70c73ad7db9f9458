"""Prepared folders made by hand, small, with shards of any sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imdm_scale.data.folder import FetchSettings, PreparedFolder
from imdm_scale.data.manifest import FILE_NAME, FORMAT, Manifest, Shard, Split, TokenizerRecord


def write_folder(
    folder: Path, splits: Mapping[str, Sequence[int]], length: int = 4, window: int = 2, dtype: str = "uint32"
) -> Manifest:
    """A folder whose block number b of a split (over all its shards) is b, b + 1, ...

    Args:
        splits: blocks of each shard of each split.
    """
    entries = {}
    for split, sizes in splits.items():
        (folder / split).mkdir(parents=True)
        shards, first = [], 0
        for index, size in enumerate(sizes):
            name = f"{split}/{index:05d}.npy"
            np.save(folder / name, (first + np.arange(size)[:, None] + np.arange(length)).astype(dtype))
            content = (folder / name).read_bytes()
            shards.append(Shard(name, size, len(content), hashlib.sha256(content).hexdigest()))
            first += size
        entries[split] = Split(first, first * length, 0, tuple(shards))
    tokenizer = TokenizerRecord("f" * 64, 2**31, 1, 2, 2**31 - 1)
    manifest = Manifest(FORMAT, length, dtype, window, tokenizer, {}, {}, entries)
    (folder / FILE_NAME).write_text(manifest.to_json())
    return manifest


def fetch_settings(cache_dir: Path, cache_bytes: int = 1 << 30, attempts: int = 2) -> FetchSettings:
    """Impatient ones."""
    return FetchSettings(cache_dir, cache_bytes, attempts=attempts, first_delay=0.01, timeout=5.0)


def open_folder(folder: Path) -> PreparedFolder:
    """A folder on this machine, without a cache."""
    return PreparedFolder.open(str(folder), fetch_settings(folder / "no_cache"))
