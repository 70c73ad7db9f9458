"""Prepared folders: local, in fsspec's memory, and behind a web server that fails on purpose. Ahead of use:
test_folder_ahead.py."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import tokenizers

from imdm_scale.data.folder import PreparedFolder
from imdm_scale.data.manifest import FILE_NAME
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.data.verified import DamagedShard
from imdm_scale.errors import UserError
from tests.data_pipeline.failing_server import FailingServer
from tests.data_pipeline.served_folder import (
    cached,
    fetch,
    folder,
    in_memory,
    server,
    shards_of,
    write_failures,
)
from tests.data_pipeline.small_folder import BLOCKS, LENGTH, blocks_of

__all__ = ["fetch", "folder", "in_memory", "server"]


@pytest.mark.parametrize("scheme", ["", "file://", "memory", "http"])
def test_every_shard_is_a_read_only_map_of_its_file(request, folder, fetch, scheme):
    if scheme == "memory":
        url = request.getfixturevalue("in_memory") + "/"
    elif scheme == "http":
        url = request.getfixturevalue("server").url
    else:
        url = f"{scheme}{folder}"
    prepared = PreparedFolder.open(url, fetch)
    for shard in [*shards_of(prepared), *shards_of(prepared, "valid")]:
        blocks = prepared.open_shard(shard)
        assert isinstance(blocks.base, np.memmap)
        assert blocks.dtype == np.uint16
        assert not blocks.flags.writeable
        assert np.array_equal(blocks, blocks_of(folder, shard))
    if scheme in ("", "file://"):
        assert not fetch.cache_dir.exists(), "local data are never copied"
        assert prepared.required_bytes("train") == 0
    else:
        assert len(cached(fetch)) == 5
        assert prepared.required_bytes("train") == sum(shard.num_bytes for shard in shards_of(prepared))
        assert prepared.required_bytes("valid") == shards_of(prepared, "valid")[0].num_bytes


def test_first_blocks(folder, server, fetch):
    everything = np.concatenate([np.load(file) for file in sorted((folder / "train").iterdir())])
    for url in (str(folder), server.url):
        prepared = PreparedFolder.open(url, fetch)
        for count in (0, 1, BLOCKS, BLOCKS + 1, 4 * BLOCKS, 10**9):
            blocks = prepared.first_blocks("train", count)
            assert type(blocks) is np.ndarray
            assert blocks.dtype == np.uint16
            assert np.array_equal(blocks, everything[:count])
        with pytest.raises(UserError, match="holds no split test, only train and valid"):
            prepared.first_blocks("test", 1)
    assert server.requests["train/00000.npy"] == 1
    prepared = PreparedFolder.open(server.url, replace(fetch, cache_dir=fetch.cache_dir / "other"))
    prepared.first_blocks("train", 1)
    assert server.requests["train/00001.npy"] == 1, "only what is needed is fetched"


def test_a_shard_is_fetched_once_for_all_folders_with_one_cache(server, folder, fetch):
    for _ in range(2):
        prepared = PreparedFolder.open(server.url, fetch)
        for shard in shards_of(prepared) * 2:
            assert np.array_equal(prepared.open_shard(shard), blocks_of(folder, shard))
    assert [server.requests[shard.file] for shard in shards_of(prepared)] == [1] * 4


# Failures of the other side


@pytest.mark.parametrize("failure", ["error", "truncated", "short", "corrupt", "missing"])
def test_a_passing_failure_is_retried_with_a_warning(server, folder, fetch, caplog, failure):
    shard = write_failures(server, "train/00001.npy", [failure])
    with caplog.at_level(logging.WARNING):
        prepared = PreparedFolder.open(server.url, fetch)
        assert np.array_equal(
            prepared.open_shard(shards_of(prepared)[1]), blocks_of(folder, shards_of(prepared)[1])
        )
    assert server.requests[shard] == 2
    (record,) = caplog.records
    assert (
        f"{server.url}/{shard}: attempt 1 of {2 if failure == 'missing' else 3} failed" in record.getMessage()
    )


@pytest.mark.parametrize("failure", ["hang", "stall"])
def test_silence_counts_as_a_failed_attempt(server, folder, fetch, failure):
    write_failures(server, "train/00001.npy", [failure])
    prepared = PreparedFolder.open(server.url, replace(fetch, timeout=0.3))
    shard = shards_of(prepared)[1]
    assert np.array_equal(prepared.open_shard(shard), blocks_of(folder, shard))
    assert server.requests[shard.file] == 2


def test_a_slow_answer_is_no_silence(folder, fetch):
    with FailingServer(folder, slow_rate=2000) as server:
        write_failures(server, "train/00001.npy", ["slow"])
        prepared = PreparedFolder.open(server.url, replace(fetch, timeout=0.4))
        shard = shards_of(prepared)[1]
        assert shard.num_bytes / server.slow_rate > 0.5, "longer than the time-out"
        assert np.array_equal(prepared.open_shard(shard), blocks_of(folder, shard))
        assert server.requests[shard.file] == 1


@pytest.mark.parametrize(
    ("failure", "attempts", "reason"),
    [
        ("error", 3, "500"),
        ("missing", 2, "there is no such file"),
        ("forbidden", 2, "403"),
        ("truncated", 3, "ClientPayloadError"),
        ("short", 3, r"its size is 576 bytes, but the manifest says 1152"),
        ("corrupt", 3, r"its SHA-256 is [0-9a-f]{16}\.\.\., but the manifest says [0-9a-f]{16}\.\.\."),
        ("hang", 3, r"nothing came for 0\.2 s"),
    ],
)
def test_a_lasting_failure_names_shard_attempts_and_reason(server, fetch, failure, attempts, reason):
    file = write_failures(server, "train/00002.npy", [failure] * 3)
    prepared = PreparedFolder.open(server.url, replace(fetch, timeout=0.2 if failure == "hang" else 30))
    with pytest.raises(
        DamagedShard,
        match=rf"{server.url}/{file} cannot be fetched \({attempts} attempts, the last: .*{reason}",
    ) as raised:
        prepared.open_shard(shards_of(prepared)[2])
    assert "data.on_damage=skip" in str(raised.value)
    assert server.requests[file] == attempts
    assert not cached(fetch), "nothing is left behind"
    server.failures.clear()
    prepared.open_shard(shards_of(prepared)[2])  # and it is not given up for good


def test_delays_double_up_to_the_longest(server, fetch, monkeypatch):
    delays = []
    monkeypatch.setattr("imdm_scale.data.fetch.time.sleep", delays.append)
    write_failures(server, "train/00000.npy", ["error"] * 9)
    prepared = PreparedFolder.open(server.url, replace(fetch, attempts=10, first_delay=1.0))
    prepared.open_shard(shards_of(prepared)[0])
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_file_system_without_time_outs_of_its_own(in_memory, fetch, monkeypatch):
    """A read that never returns is left behind by the thread that waits for it."""
    prepared = PreparedFolder.open(in_memory, replace(fetch, timeout=0.1, attempts=2))
    never = threading.Event()
    monkeypatch.setattr(
        "fsspec.implementations.memory.MemoryFile.read", lambda *arguments: never.wait(), raising=False
    )
    with pytest.raises(DamagedShard, match=r"2 attempts, the last: nothing came for 0\.1 s"):
        prepared.open_shard(shards_of(prepared)[0])
    never.set()


# Opening


def test_no_prepared_data(folder, tmp_path, server, in_memory, fetch):
    for path in (tmp_path / "nowhere", folder / "train"):
        with pytest.raises(UserError, match=rf"{path}/{FILE_NAME} cannot be read \(.*tools/prepare_data.py"):
            PreparedFolder.open(str(path), fetch)
    for url in (f"{server.url}/train", f"{in_memory}/train"):
        with pytest.raises(
            UserError, match=rf"{url}/{FILE_NAME} .*2 attempts.*no such file.*tools/prepare_data.py"
        ):
            PreparedFolder.open(url, fetch)
    (folder / FILE_NAME).write_text("{}")
    with pytest.raises(UserError, match="is no manifest of prepared data"):
        PreparedFolder.open(str(folder), fetch)


def test_unreachable_server(folder, fetch):
    with FailingServer(folder) as server:
        url = server.url
    with pytest.raises(
        UserError, match=rf"{url}/{FILE_NAME} cannot be fetched \(3 attempts, the last: .*connect"
    ):
        PreparedFolder.open(url, fetch)


@pytest.mark.parametrize("failure", ["error", "short", "truncated"])
def test_manifest_is_retried(server, fetch, failure):
    write_failures(server, FILE_NAME, [failure, failure])
    assert PreparedFolder.open(server.url, fetch).manifest.length == LENGTH
    assert server.requests[FILE_NAME] == 3


def test_missing_driver_and_unknown_protocol(fetch):
    fsspec.register_implementation("nodriver", "no_such_driver.Files", errtxt="Install no_such_driver")
    with pytest.raises(UserError, match="pip install 'no_such_driver'"):
        PreparedFolder.open("nodriver://bucket/data", fetch)
    with pytest.raises(UserError, match="s4://, which is no protocol"):
        PreparedFolder.open("s4://bucket/data", fetch)


def test_a_hash_that_is_none_names_no_file(folder, fetch):
    text = (folder / FILE_NAME).read_text()
    sha256 = PreparedFolder.open(str(folder), fetch).manifest.splits["train"].shards[0].sha256
    (folder / FILE_NAME).write_text(text.replace(sha256, "../" + sha256[3:]))
    with pytest.raises(UserError, match=r"train/00000.npy that its SHA-256 is '\.\./"):
        PreparedFolder.open(str(folder), fetch)


# Damage on local disks


def test_damaged_local_shards_are_named(folder, fetch):
    prepared = PreparedFolder.open(str(folder), fetch)
    corrupt, short, missing, whole = shards_of(prepared)
    content = bytearray((folder / corrupt.file).read_bytes())
    content[-1] ^= 1
    (folder / corrupt.file).write_bytes(content)
    (folder / short.file).write_bytes(content[:-2])
    (folder / missing.file).unlink()
    for shard, reason in (
        (corrupt, "is damaged: its SHA-256 is .*, but the manifest says"),
        (short, "is damaged: its size is 1150 bytes, but the manifest says 1152"),
        (missing, "is missing"),
    ):
        for _ in range(2):
            with pytest.raises(DamagedShard, match=rf"{folder}/{shard.file} {reason}.*data\.on_damage=skip"):
                prepared.open_shard(shard)
    assert np.array_equal(prepared.open_shard(whole), blocks_of(folder, whole))


def test_a_whole_file_of_another_shape(folder, fetch):
    manifest = PreparedFolder.open(str(folder), fetch).manifest
    prepared = PreparedFolder(str(folder), replace(manifest, length=LENGTH // 2), fetch)
    with pytest.raises(DamagedShard, match=r"is no array of uint16 with 32 x 8 ids"):
        prepared.open_shard(manifest.splits["train"].shards[0])


def test_a_shard_is_read_whole_only_once_a_process(folder, fetch, monkeypatch):
    digests = []
    file_digest = __import__("hashlib").file_digest
    monkeypatch.setattr(
        "imdm_scale.data.verified.hashlib.file_digest", lambda *args: digests.append(1) or file_digest(*args)
    )
    prepared = PreparedFolder.open(str(folder), fetch)
    for shard in shards_of(prepared) * 3:
        prepared.open_shard(shard)
    assert len(digests) == 4


def test_a_copy_in_the_cache_that_the_disk_damaged_is_fetched_again(server, folder, fetch, caplog):
    shard = shards_of(PreparedFolder.open(server.url, fetch))[0]
    PreparedFolder.open(server.url, fetch).open_shard(shard)
    (file,) = cached(fetch)
    file.write_bytes(bytes(shard.num_bytes))
    with caplog.at_level(logging.WARNING):
        blocks = PreparedFolder.open(server.url, fetch).open_shard(shard)
    assert np.array_equal(blocks, blocks_of(folder, shard))
    assert server.requests[shard.file] == 2
    assert "in the cache is damaged" in caplog.text


# The tokenizer


def test_a_store_that_hides_what_is_missing(server, fetch):
    """Stores of objects answer 403 for what is not there, to those who may not list it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_failures(server, f"tokenizer/{name}", ["forbidden"])
    prepared = PreparedFolder.open(server.url, fetch)
    found = load_tokenizer(prepared.tokenizer_folder())
    assert found.fingerprint == prepared.manifest.tokenizer.fingerprint


def byte_level(directory):
    """A small byte-level BPE tokenizer as a folder of Hugging Face files."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(["some words to learn some pieces from"], trainer)
    backend.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory, bos="<|endoftext|>", eos="<|endoftext|>")


@pytest.mark.parametrize("kind", ["packaged", "other boundaries", "byte level"])
@pytest.mark.parametrize("scheme", ["memory", "http"])
def test_tokenizer_folder(request, tmp_path, folder, fetch, kind, scheme):
    """Whatever files a kind of tokenizer is saved as, all of them arrive, once."""
    made = tmp_path / "made"
    made.mkdir()
    if kind == "byte level":
        tokenizer = byte_level(made)
    else:
        tokenizer = load_tokenizer(None, bos="\u2581the" if kind == "other boundaries" else None)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    tokenizer.save(folder / "tokenizer")
    manifest = PreparedFolder.open(str(folder), fetch).manifest
    manifest = replace(manifest, tokenizer=replace(manifest.tokenizer, fingerprint=tokenizer.fingerprint))
    assert PreparedFolder(str(folder), manifest, fetch).tokenizer_folder() == folder / "tokenizer"
    server = request.getfixturevalue("server") if scheme == "http" else None
    url = server.url if server else request.getfixturevalue("in_memory")
    for _ in range(2):
        found = PreparedFolder(url, manifest, fetch).tokenizer_folder()
        assert load_tokenizer(found).fingerprint == tokenizer.fingerprint
        assert sorted(os.listdir(found)) == sorted(os.listdir(folder / "tokenizer"))
    if server:
        assert all(count == 1 for path, count in server.requests.items() if path.startswith("tokenizer"))


def test_tokenizer_of_other_ids_is_refused(server, fetch):
    manifest = PreparedFolder.open(server.url, fetch).manifest
    foreign = replace(manifest, tokenizer=replace(manifest.tokenizer, fingerprint="0" * 64))
    with pytest.raises(
        UserError, match=r"holds a tokenizer with the fingerprint .* made by 0000000000000000;"
    ):
        PreparedFolder(server.url, foreign, fetch).tokenizer_folder()
    write_failures(server, "tokenizer/tokenizer.model", ["error"] * 3)
    with pytest.raises(UserError, match=r"tokenizer cannot be fetched \(3 attempts, the last: .*500"):
        PreparedFolder(server.url, foreign, fetch).tokenizer_folder()


def test_a_local_path_stays_as_it_was_given(folder, fetch, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert PreparedFolder.open("prepared/", fetch).url == "prepared"
    prepared = PreparedFolder.open(f"file://{folder}", fetch)
    assert prepared.url == str(folder)
    assert PreparedFolder(f"file://{folder}/", prepared.manifest, fetch).url == str(folder)
    assert PreparedFolder("s3://bucket/data/", prepared.manifest, fetch).url == "s3://bucket/data"
