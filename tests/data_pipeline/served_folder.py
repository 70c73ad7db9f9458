"""What tests of prepared folders share: a small one, on the disk, in memory and behind a web server that may fail."""

from __future__ import annotations

import time

import fsspec
import pytest

from imdm_scale.data.fetch import FetchSettings
from tests.data_pipeline.failing_server import FailingServer
from tests.data_pipeline.small_folder import write_small_folder


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "prepared"
    write_small_folder(path)
    return path


@pytest.fixture
def fetch(tmp_path):
    return FetchSettings(tmp_path / "cache", 1 << 20, attempts=3, first_delay=0.01, timeout=30)


@pytest.fixture
def server(folder):
    with FailingServer(folder) as server:
        yield server


@pytest.fixture
def in_memory(folder):
    """The folder copied into fsspec's memory; its URL."""
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/prepared", recursive=True)
    yield "memory://prepared"
    files.rm("/prepared", recursive=True)


def shards_of(prepared, split="train"):
    return prepared.manifest.splits[split].shards


def cached(fetch):
    return sorted((fetch.cache_dir / "shards").iterdir())


def wait_until(true):
    while not true():
        time.sleep(0.005)


def write_failures(server, file, failures):
    server.failures[file] = list(failures)
    return file
