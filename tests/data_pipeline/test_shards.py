"""Shard files: what is written, read and hashed."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imdm_scale.data.shards import ShardWriter, file_hash, map_shard, shard_dtype


def blocks_of(num_blocks, length=4, dtype="uint16"):
    return np.random.default_rng(0).integers(0, 2**16, (num_blocks, length), dtype=dtype)


def npy_bytes(blocks):
    stream = io.BytesIO()
    np.save(stream, blocks)
    return stream.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    parts=st.lists(st.integers(0, 12), max_size=5),
    rows_of_whole=st.integers(1, 7),
    slack=st.integers(0, 7),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
def test_files_are_those_of_numpy_whatever_is_written_at_a_time(
    tmp_path_factory, parts, rows_of_whole, slack, dtype
):
    folder = tmp_path_factory.mktemp("folder") / "train"
    blocks = blocks_of(sum(parts), 4, dtype)
    shard_bytes = len(npy_bytes(blocks[:0])) + rows_of_whole * 4 * blocks.itemsize + slack
    writer = ShardWriter(folder, 4, dtype, shard_bytes)
    ends = np.cumsum(parts)
    shards = [
        shard for end, num in zip(ends, parts, strict=True) for shard in writer.write(blocks[end - num : end])
    ]
    shards += writer.finish()
    expected = [blocks[i : i + rows_of_whole] for i in range(0, len(blocks), rows_of_whole)]
    files = sorted(folder.iterdir())
    assert [f"train/{file.name}" for file in files] == [shard.file for shard in shards]
    assert [file.read_bytes() for file in files] == [npy_bytes(part) for part in expected]
    for file, shard, part in zip(files, shards, expected, strict=True):
        content = file.read_bytes()
        assert shard.num_bytes == len(content) <= shard_bytes
        assert shard.sha256 == hashlib.sha256(content).hexdigest() == file_hash(file)
        with file.open("rb") as stream:
            opened = map_shard(stream, shard.num_blocks, 4, dtype)
        assert np.array_equal(opened, part)
        assert opened.dtype == dtype
        assert not opened.flags.writeable


def test_a_block_larger_than_a_shard_has_a_shard_of_its_own(tmp_path):
    writer = ShardWriter(tmp_path / "train", 1000, "uint16", shard_bytes=1)
    assert [shard.num_blocks for shard in writer.write(blocks_of(3, 1000))] == [1, 1, 1]


def test_numbers_go_on_behind_the_first_ones(tmp_path):
    writer = ShardWriter(tmp_path / "valid", 4, "uint16", 1000, first=12)
    writer.write(blocks_of(1))
    assert [shard.file for shard in writer.finish()] == ["valid/00012.npy"]


def test_what_is_not_whole_has_no_name_and_goes_away(tmp_path):
    writer = ShardWriter(tmp_path / "train", 4, "uint16", 1000)
    writer.write(blocks_of(5))
    assert [file.name for file in (tmp_path / "train").iterdir()] == [".00000.npy.partial"]
    writer.close()
    assert list((tmp_path / "train").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-1], "mmap length is greater"),
        (lambda content: npy_bytes(blocks_of(4, 5)), "no array of uint16 with 5 x 4 ids"),
        (lambda content: npy_bytes(blocks_of(5).view(np.int16)), "no array of uint16 with 5 x 4 ids"),
        (lambda content: content[:6] + b"\2" + content[7:], "no array of uint16 with 5 x 4 ids"),
        (lambda content: b"X" + content[1:], "magic string"),
    ],
)
def test_a_file_that_is_not_the_shard(tmp_path, change, reason):
    file = tmp_path / "00000.npy"
    file.write_bytes(change(npy_bytes(blocks_of(5))))
    with file.open("rb") as stream, pytest.raises(ValueError, match=reason):
        map_shard(stream, 5, 4, "uint16")


def test_the_narrowest_type():
    assert [shard_dtype(size) for size in (4097, 65536, 65537, 10**6)] == [
        "uint16",
        "uint16",
        "uint32",
        "uint32",
    ]
