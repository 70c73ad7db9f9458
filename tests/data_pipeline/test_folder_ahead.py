"""Prepared folders whose shards are fetched ahead in the background, and folders that pass to other processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from imdm_scale.data.folder import PreparedFolder
from imdm_scale.data.verified import DamagedShard
from tests.data_pipeline.served_folder import (
    cached,
    fetch,
    folder,
    in_memory,
    server,
    shards_of,
    wait_until,
    write_failures,
)
from tests.data_pipeline.small_folder import blocks_of

__all__ = ["fetch", "folder", "in_memory", "server"]


# In the background


def test_prefetch_fetches_in_order_and_opening_finds_it_there(server, folder, fetch):
    prepared = PreparedFolder.open(server.url, fetch)
    shards = shards_of(prepared)
    prepared.prefetch([shards[2], shards[0], shards[3]])
    wait_until(
        lambda: (
            sum(file.suffix == ".npy" for file in cached(fetch)) == 3 if fetch.cache_dir.exists() else False
        )
    )
    assert [path for path in server.requests if path.startswith("train")] == [
        shards[i].file for i in (2, 0, 3)
    ]
    for shard in shards:
        assert np.array_equal(prepared.open_shard(shard), blocks_of(folder, shard))
        assert server.requests[shard.file] == 1


def test_prefetch_stops_where_the_cache_is_full(server, fetch):
    prepared = PreparedFolder.open(server.url, replace(fetch, cache_bytes=2500))
    shards = shards_of(prepared)
    prepared.prefetch(shards)
    wait_until(lambda: server.requests[shards[1].file])
    prepared.open_shard(shards[1])
    wait_until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))
    assert server.requests[shards[2].file] == 0, "it would drive out what was fetched before it"


def test_the_latest_call_replaces_what_is_not_begun(server, folder, fetch):
    prepared = PreparedFolder.open(server.url, replace(fetch, timeout=0.3))
    shards = shards_of(prepared)
    write_failures(server, shards[0].file, ["hang"])
    prepared.prefetch(shards[:2])
    wait_until(lambda: server.requests[shards[0].file])
    prepared.prefetch(shards[2:])
    for shard in (shards[0], *shards[2:]):
        prepared.open_shard(shard)
    wait_until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))
    assert server.requests[shards[1].file] == 0


def test_a_failed_prefetch_is_tried_again_when_the_shard_is_opened(server, folder, fetch, caplog):
    prepared = PreparedFolder.open(server.url, fetch)
    shards = shards_of(prepared)
    write_failures(server, shards[0].file, ["error"] * 3)
    write_failures(server, shards[1].file, ["error"] * 6)
    prepared.prefetch(shards[:3])
    wait_until(lambda: server.requests[shards[2].file])
    assert server.requests[shards[0].file] == server.requests[shards[1].file] == 3
    assert np.array_equal(prepared.open_shard(shards[0]), blocks_of(folder, shards[0]))
    with pytest.raises(DamagedShard, match="3 attempts"):
        prepared.open_shard(shards[1])


def test_prefetch_verifies_local_shards(folder, fetch, caplog):
    prepared = PreparedFolder.open(str(folder), fetch)
    shards = shards_of(prepared)
    (folder / shards[0].file).write_bytes(bytes(shards[0].num_bytes))
    with caplog.at_level(logging.WARNING):
        prepared.prefetch(shards)
        wait_until(lambda: "00000.npy is damaged" in caplog.text)
    with pytest.raises(DamagedShard):
        prepared.open_shard(shards[0])


def test_a_process_ends_while_it_prefetches(server, folder, fetch):
    """A server that never answers does not keep the process, nor does its death leave a mark on the cache."""
    write_failures(server, "train/00000.npy", ["hang"])
    program = f"""
import sys, time
from pathlib import Path
from imdm_scale.data.folder import FetchSettings, PreparedFolder
prepared = PreparedFolder.open({server.url!r}, FetchSettings(Path({str(fetch.cache_dir)!r}), 1 << 20, timeout=600))
prepared.prefetch(prepared.manifest.splits["train"].shards)
parts = Path({str(fetch.cache_dir)!r}) / "shards"
while not parts.exists() or not list(parts.glob("*.part")):
    time.sleep(0.01)
print("ends")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "ends\n"), ended.stderr
    assert "Traceback" not in ended.stderr
    prepared = PreparedFolder.open(server.url, fetch)
    assert np.array_equal(
        prepared.open_shard(shards_of(prepared)[0]), blocks_of(folder, shards_of(prepared)[0])
    )
    assert len(cached(fetch)) == 1


# Other processes


def test_pickled(server, folder, fetch):
    prepared = PreparedFolder.open(server.url, fetch)
    prepared.open_shard(shards_of(prepared)[0])
    again = pickle.loads(pickle.dumps(prepared))
    assert (again.url, again.manifest, again.fetch) == (prepared.url, prepared.manifest, prepared.fetch)
    assert np.array_equal(again.open_shard(shards_of(again)[1]), blocks_of(folder, shards_of(again)[1]))


def test_no_file_system_is_kept(server, in_memory, fetch):
    """fsspec would keep one for each thread that ever fetched, and one with an event loop survives no fork."""
    kinds = [fsspec.get_filesystem_class(protocol) for protocol in ("http", "memory")]
    before = [len(kind._cache) for kind in kinds]
    for url in (server.url, in_memory):
        prepared = PreparedFolder.open(url, replace(fetch, cache_dir=fetch.cache_dir / url[:4]))
        prepared.open_shard(shards_of(prepared)[0])
    assert [len(kind._cache) for kind in kinds] == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_while_the_background_thread_is_at_work(server, folder, fetch):
    """The child has neither the parent's threads nor its event loop, and does not wait for the locks of either."""
    prepared = PreparedFolder.open(server.url, fetch)
    shards = shards_of(prepared)
    write_failures(server, shards[0].file, ["hang"])
    prepared.prefetch(shards[:1])
    wait_until(lambda: server.requests[shards[0].file])
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            prepared.prefetch(shards[2:])
            for shard in shards[2:]:
                wait_until((fetch.cache_dir / "shards" / f"{shard.sha256}.npy").exists)
            sender.send([prepared.open_shard(shard).sum() for shard in shards[1:]])
        finally:
            os._exit(0)
    try:
        assert receiver.poll(30), "the child hangs"
        assert receiver.recv() == [blocks_of(folder, shard).sum() for shard in shards[1:]]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
