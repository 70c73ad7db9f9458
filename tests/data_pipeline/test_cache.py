"""The cache of shards: its bound, and several processes at once."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import resource
import signal
import threading
import time

import filelock
import numpy as np
import pytest

from imdm_scale.data.cache import ShardCache
from imdm_scale.data.fetch import FetchSettings
from imdm_scale.data.folder import PreparedFolder
from imdm_scale.data.manifest import Shard
from imdm_scale.data.verified import DamagedShard
from imdm_scale.errors import UserError
from tests.data_pipeline.failing_server import FailingServer
from tests.data_pipeline.small_folder import blocks_of, write_small_folder

SIZE = 100


def shard_of(content):
    return Shard(f"train/{content[0]}.npy", 1, len(content), hashlib.sha256(content).hexdigest())


CONTENTS = [bytes([number]) * SIZE for number in range(6)]
SHARDS = [shard_of(content) for content in CONTENTS]


class Source:
    """What the cache fetches from; counts how often."""

    def __init__(self):
        self.fetched = []

    def __call__(self, number):
        def fetch(stream):
            self.fetched.append(number)
            stream.write(CONTENTS[number])

        return fetch


def read(cache, source, number):
    with cache.open(SHARDS[number], source(number)) as stream:
        return stream.read()


def kept(cache):
    """Sizes of the files in the cache at one moment."""
    with cache.lock("room"):
        return {entry.name: entry.stat().st_size for entry in os.scandir(cache.directory / "shards")}


def numbers_kept(cache):
    return {number for number, shard in enumerate(SHARDS) if f"{shard.sha256}.npy" in kept(cache)}


def wait_until(true):
    while not true():
        time.sleep(0.005)


def in_threads(*calls):
    """Starts each call in a thread; returns the threads and a list of the results, which fill in as they end."""
    results = [None] * len(calls)

    def keep(index, call):
        try:
            results[index] = call()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=keep, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    return threads, results


def test_the_least_recently_used_go_first(tmp_path):
    cache, source = ShardCache(tmp_path / "deep" / "cache", 4 * SIZE + 50), Source()
    for number in (0, 1, 2, 3, 0):
        assert read(cache, source, number) == CONTENTS[number]
    assert source.fetched == [0, 1, 2, 3]
    read(cache, source, 4)
    assert numbers_kept(cache) == {0, 2, 3, 4}
    again = ShardCache(tmp_path / "deep" / "cache", 2 * SIZE)  # another run with a smaller bound
    read(again, source, 5)
    assert numbers_kept(cache) == {4, 5}
    assert read(again, source, 4) == CONTENTS[4]
    assert source.fetched == [0, 1, 2, 3, 4, 5]


def test_a_file_that_is_removed_while_it_is_mapped_stays_readable(tmp_path):
    cache, source = ShardCache(tmp_path, SIZE), Source()
    with cache.open(SHARDS[0], source(0)) as stream:
        mapped = np.memmap(stream, np.uint8, mode="r")
    read(cache, source, 1)
    assert numbers_kept(cache) == {1}
    assert mapped.tobytes() == CONTENTS[0]


def test_a_cache_too_small_for_a_shard(tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_gib is 9\.22e-08, which does not hold train/0\.npy of"):
        read(ShardCache(tmp_path, SIZE - 1), Source(), 0)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=rf"data\.cache_dir {tmp_path}/file/cache cannot be written \(Not a directory"
    ):
        ShardCache(tmp_path / "file" / "cache", SIZE)


def test_a_full_disk(tmp_path):
    cache = ShardCache(tmp_path, 1 << 30)

    def full(stream):
        stream.write(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        UserError, match=r"data\.cache_dir .* \(No space left on device\).*data\.cache_gib \(now 1\)"
    ):
        cache.open(SHARDS[0], full)
    assert not kept(cache)


def test_a_disk_that_takes_no_file_of_that_size(tmp_path):
    cache, source = ShardCache(tmp_path, SIZE), Source()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"data\.cache_dir .* \(File too large\)"):
            read(cache, source, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(cache, source, 0) == CONTENTS[0]


def test_what_dead_processes_left_behind_is_removed(tmp_path):
    cache, source = ShardCache(tmp_path, 2 * SIZE), Source()
    for number in (0, 1):  # the shard itself, and another one
        (tmp_path / "shards" / f"{SHARDS[number].sha256}.part").write_bytes(bytes(SIZE))
    assert read(cache, source, 0) == CONTENTS[0]
    assert list(kept(cache)) == [f"{SHARDS[0].sha256}.npy"]


def test_fetches_that_do_not_fit_together_wait_for_each_other(tmp_path):
    """The room of a shard that is being fetched is taken from the beginning, and not given away before the end."""
    cache, source, go_on = ShardCache(tmp_path, 2 * SIZE), Source(), threading.Event()

    def slow(stream):
        go_on.wait()
        source(0)(stream)

    read(cache, source, 1)
    threads, results = in_threads(lambda: cache.open(SHARDS[0], slow).read())
    wait_until(lambda: f"{SHARDS[0].sha256}.part" in kept(cache))
    assert sum(kept(cache).values()) == 2 * SIZE
    read(cache, source, 2)
    assert numbers_kept(cache) == {2}, "the unfinished one stays"
    small = ShardCache(tmp_path, SIZE)
    more, more_results = in_threads(lambda: read(small, source, 3))
    more[0].join(0.2)
    assert 3 not in source.fetched
    go_on.set()
    for thread in threads + more:
        thread.join()
    assert (results, more_results) == ([CONTENTS[0]], [CONTENTS[3]])
    assert numbers_kept(cache) == {3}


def test_one_fetches_and_the_others_wait(tmp_path):
    cache, source, go_on = CountingCache(tmp_path, 2 * SIZE), Source(), threading.Event()

    def slow(stream):
        go_on.wait()
        source(0)(stream)

    threads, results = in_threads(*[lambda: cache.open(SHARDS[0], slow).read()] * 4)
    wait_until(lambda: cache.locked.count(SHARDS[0].sha256) == 4)
    go_on.set()
    for thread in threads:
        thread.join()
    assert results == [CONTENTS[0]] * 4
    assert source.fetched == [0]


def test_those_who_waited_take_over_a_failure(tmp_path):
    """Otherwise each process of a node would go through all retries, one after the other."""
    cache, fetched, go_on = CountingCache(tmp_path, 2 * SIZE), [], threading.Event()

    def fails(stream):
        fetched.append(0)
        go_on.wait()
        raise DamagedShard("there is no such file")

    threads, results = in_threads(*[lambda: cache.open(SHARDS[0], fails)] * 4)
    wait_until(lambda: cache.locked.count(SHARDS[0].sha256) == 4)
    go_on.set()
    for thread in threads:
        thread.join()
    assert [(type(error), str(error)) for error in results] == [(DamagedShard, "there is no such file")] * 4
    assert fetched == [0]
    assert not kept(cache)
    time.sleep(0.01)  # beyond the resolution of a file's time
    with pytest.raises(DamagedShard):
        cache.open(SHARDS[0], fails)
    assert fetched == [0, 0], "who asks afterwards tries again"
    assert read(cache, Source(), 0) == CONTENTS[0]


class CountingCache(ShardCache):
    """Knows who has asked for which lock."""

    def __init__(self, *arguments):
        self.locked = []
        super().__init__(*arguments)

    def lock(self, name):
        self.locked.append(name)
        return super().lock(name)


# Several processes

NUM_SHARDS, HELD, NUM_PROCESSES = 20, 4, 3


def _stream(url, fetch, barrier, results):
    prepared = PreparedFolder.open(url, fetch)
    shards = prepared.manifest.splits["train"].shards
    sums = []
    for index, shard in enumerate(shards):
        barrier.wait(60)
        prepared.prefetch(shards[index : index + 3])
        sums.append(int(prepared.open_shard(shard).sum(dtype=np.int64)))
    results.put(sums)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_share_the_downloads_within_the_bound(tmp_path, method):
    manifest = write_small_folder(tmp_path / "prepared", NUM_SHARDS)
    shards = manifest.splits["train"].shards
    cache_bytes = HELD * shards[0].num_bytes
    cache = ShardCache(tmp_path / "cache", cache_bytes)
    context = multiprocessing.get_context(method)
    barrier, results = context.Barrier(NUM_PROCESSES), context.Queue()
    with FailingServer(tmp_path / "prepared") as server:
        for shard in shards[::3]:
            server.failures[shard.file] = ["truncated"]
        arguments = (
            server.url,
            FetchSettings(cache.directory, cache_bytes, first_delay=0.01),
            barrier,
            results,
        )
        processes = [context.Process(target=_stream, args=arguments) for _ in range(NUM_PROCESSES)]
        for process in processes:
            process.start()
        sizes, ended = [], threading.Event()
        watchers, _ = in_threads(lambda: watch(cache, sizes, ended))
        sums = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        ended.set()
        watchers[0].join()
        num_requests = sum(server.requests[shard.file] for shard in shards)
    assert sums == [[int(blocks_of(tmp_path / "prepared", shard).sum()) for shard in shards]] * NUM_PROCESSES
    assert max(sizes) == cache_bytes
    assert all(server.requests[shard.file] >= 1 for shard in shards)
    # One download of each, 7 failures; a process that falls behind may have to fetch one again.
    assert num_requests < 2 * NUM_SHARDS


def watch(cache, sizes, ended):
    while not ended.is_set():
        sizes.append(sum(kept(cache).values()))
        time.sleep(0.002)


def _open_first(url, fetch):
    prepared = PreparedFolder.open(url, fetch)
    prepared.open_shard(prepared.manifest.splits["train"].shards[0])


def test_a_killed_downloader_is_replaced(tmp_path):
    folder = tmp_path / "prepared"
    shard = write_small_folder(folder).splits["train"].shards[0]
    fetch = FetchSettings(tmp_path / "cache", 1 << 20)
    with FailingServer(folder, slow_rate=20) as server:  # a minute for a shard
        server.failures[shard.file] = ["slow"]
        downloader = multiprocessing.get_context("spawn").Process(
            target=_open_first, args=(server.url, fetch)
        )
        downloader.start()
        wait_until(lambda: server.requests[shard.file])
        prepared = PreparedFolder.open(server.url, fetch)
        threads, results = in_threads(lambda: prepared.open_shard(shard))
        threads[0].join(0.3)
        assert server.requests[shard.file] == 1, "the other process is still at it"
        os.kill(downloader.pid, signal.SIGKILL)
        downloader.join()
        threads[0].join()
        assert np.array_equal(results[0], blocks_of(folder, shard))
        assert server.requests[shard.file] == 2
    assert os.listdir(tmp_path / "cache" / "shards") == [f"{shard.sha256}.npy"]


def test_the_lock_of_a_shard_is_known_to_other_processes(tmp_path):
    """That all files are where the module says: other tools may rely on it."""
    cache = ShardCache(tmp_path, SIZE)
    with cache.lock("name"), pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / "locks" / "name.lock", timeout=0).acquire()
