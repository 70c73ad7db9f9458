"""Streaming a corpus twenty times larger than the cache: cache and memory stay as large as they are."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from imdm_scale.data.folder import PreparedFolder
from imdm_scale.data.prepared_corpus import PreparedCorpus
from imdm_scale.data.stream import TokenStream
from tests.data_pipeline.failing_server import FailingServer
from tests.data_pipeline.prepared import fetch_settings, write_folder

MIB = 1 << 20
NUM_SHARDS, ROWS, LENGTH = 60, 256, 1024  # a shard takes 1 MiB
CACHE = 3 * MIB


def size_of(cache: Path) -> int:
    """Bytes of the shards in a cache from which another thread may be removing some."""
    total = 0
    for file in cache.rglob("*.npy"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def test_memory_and_cache_are_bounded(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", {"train": [ROWS] * NUM_SHARDS}, length=LENGTH, window=1)
    cache = tmp_path / "cache"
    with FailingServer(tmp_path / "corpus") as server:
        folder = PreparedFolder.open(server.url, fetch_settings(cache, CACHE))
        stream = TokenStream(PreparedCorpus(folder, "train"), seed=1)
        blocks, resident = set(), []
        for first in range(0, stream.num_blocks, 64):
            blocks |= set(stream.batch(first, 64)[0][:, 0].tolist())
            resident.append(psutil.Process().memory_info().rss)
            assert size_of(cache) <= CACHE
    assert len(blocks) == stream.num_blocks
    # After a sixth of the corpus everything that grows once has grown; a leak of maps would add 50 MiB by the end.
    assert resident[-1] - resident[len(resident) // 6] < 8 * MIB
    # A shard that the reader has passed before the thread that fetches ahead began may come twice, at this pace.
    counts = [count for path, count in server.requests.items() if path.startswith("train/")]
    assert len(counts) == NUM_SHARDS and sum(counts) < 1.5 * NUM_SHARDS
