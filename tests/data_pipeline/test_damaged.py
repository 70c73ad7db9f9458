"""A shard that is missing or corrupted: the run stops and names it, or goes on without it and counts."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest

from imdm_scale.data.folder import DamagedShard
from imdm_scale.data.prepared_corpus import PreparedCorpus
from imdm_scale.data.stream import TokenStream
from tests.data_pipeline.prepared import open_folder, write_folder

SIZES = (5, 4, 6, 3, 2, 7)
EPOCH = sum(SIZES)
FIRST = np.cumsum([0, *SIZES])


def stream_of(path, skip):
    return TokenStream(PreparedCorpus(open_folder(path), "train"), seed=4, skip_damaged=skip)


@pytest.fixture
def path(tmp_path):
    write_folder(tmp_path / "corpus", {"train": SIZES}, window=3)
    return tmp_path / "corpus"


def damage(path):
    """Shard 1 is gone, one byte of the last block of shard 4 is another."""
    (path / "train/00001.npy").unlink()
    file = path / "train/00004.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")


def blocks_of(stream, first, count):
    return stream.batch(first, count)[0][:, 0].tolist()


def test_stop_names_the_shard(path):
    whole = blocks_of(stream_of(path, skip=False), 0, EPOCH)
    damage(path)
    with pytest.raises(DamagedShard, match=r"train/0000[14]\.npy is (missing|damaged)"):
        blocks_of(stream_of(path, skip=False), 0, EPOCH)
    assert sorted(whole) == list(range(EPOCH))


def test_skip_replaces_exactly_what_is_damaged_whatever_the_batches(path, caplog):
    whole = blocks_of(stream_of(path, skip=True), 0, 3 * EPOCH)
    damage(path)
    stream = stream_of(path, skip=True)
    with caplog.at_level(logging.WARNING):
        blocks = blocks_of(stream, 0, 3 * EPOCH)
    lost = {*range(FIRST[1], FIRST[2]), *range(FIRST[4], FIRST[5])}
    for was, block in zip(whole, blocks, strict=True):
        assert block == was if was not in lost else block not in lost
    assert stream.num_replaced == 3 * len(lost)
    messages = [record.message for record in caplog.records if "SKIPPED DATA" in record.message]
    assert len(messages) == 2 and "2 of 6 shards, 22.2% of all blocks, are skipped" in messages[1]
    in_pieces, start = stream_of(path, skip=True), 0
    pieces = []
    for count in (1, 7, 20, 3, 3 * EPOCH - 31):
        pieces += blocks_of(in_pieces, start, count)
        start += count
        in_pieces = pickle.loads(pickle.dumps(in_pieces))
    assert pieces == blocks and in_pieces.num_replaced == stream.num_replaced


def test_a_window_without_a_whole_shard(path):
    for file in (path / "train").iterdir():
        file.unlink()
    with pytest.raises(DamagedShard, match="none of the shards that are shuffled together"):
        blocks_of(stream_of(path, skip=True), 0, 1)


def test_first_blocks_without_the_damaged_ones(path, caplog):
    whole = open_folder(path).first_blocks("train", EPOCH)[:, 0].tolist()
    damage(path)
    with pytest.raises(DamagedShard):
        open_folder(path).first_blocks("train", EPOCH)
    kept = open_folder(path).first_blocks("train", 8, skip_damaged=True)[:, 0].tolist()
    assert kept == [*whole[: FIRST[1]], *whole[FIRST[2] : FIRST[2] + 8 - SIZES[0]]]
    assert "SKIPPED DATA" in caplog.text
