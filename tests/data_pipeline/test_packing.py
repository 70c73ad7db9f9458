"""Packing against a plain loop, and the cache of packed blocks."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.corpus import read_documents
from imdm_scale.data.packing import pack, prepare_blocks
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

BOS, EOS = 1, 2


@given(st.lists(st.lists(st.integers(3, 50), max_size=20), max_size=10), st.integers(3, 12))
def test_layout_against_a_plain_loop(documents, length):
    tokens = [token for document in documents for token in [*document, EOS]]
    expected = []
    while len(tokens) >= length - 2:
        expected.append([BOS, *tokens[: length - 2], EOS])
        tokens = tokens[length - 2 :]
    blocks = pack(iter(documents), length, BOS, EOS)
    assert blocks.dtype == np.int32
    assert blocks.shape == (len(expected), length)
    assert blocks.tolist() == expected


def test_blocks_without_room_for_text():
    with pytest.raises(ValueError, match="no room"):
        pack([[3]], 2, BOS, EOS)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(read_documents(None, "valid"))[:50_000])
    return path


def test_blocks_decode_to_the_corpus_and_are_cached(text, tmp_path):
    tokenizer, cache = Tokenizer.load(None), tmp_path / "deep" / "cache"
    blocks = prepare_blocks(text, "train", tokenizer, 32, cache)
    document = next(read_documents(text, "train"))
    assert tokenizer.decode(blocks[0]) in document
    assert (blocks[:, 0] == tokenizer.bos_id).all()
    assert (blocks[:, -1] == tokenizer.eos_id).all()
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(files) == 2
    again = prepare_blocks(text, "train", tokenizer, 32, cache)
    assert isinstance(again, np.memmap)
    assert np.array_equal(blocks, again)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files


def test_another_split_length_or_corpus_gives_other_blocks(text, tmp_path):
    tokenizer = Tokenizer.load(None)
    train = prepare_blocks(text, "train", tokenizer, 32, tmp_path)
    valid = prepare_blocks(text, "valid", tokenizer, 32, tmp_path)
    assert 0 < len(valid) < len(train)
    assert prepare_blocks(text, "train", tokenizer, 16, tmp_path).shape[1] == 16
    text.write_text("\n\n".join(read_documents(None, "valid"))[:20_000])
    assert len(prepare_blocks(text, "train", tokenizer, 32, tmp_path)) < len(train)


@pytest.mark.parametrize("part", ["truncated array", "foreign header", "broken header", "no header"])
def test_damaged_cache_is_made_again(text, tmp_path, part):
    tokenizer, cache = Tokenizer.load(None), tmp_path / "cache"
    blocks = np.array(prepare_blocks(text, "train", tokenizer, 32, cache))
    (array_file,), (header_file,) = cache.glob("*.npy"), cache.glob("*.json")
    if part == "truncated array":
        array_file.write_bytes(array_file.read_bytes()[:-1000])
    elif part == "foreign header":
        header_file.write_text(header_file.read_text().replace(tokenizer.fingerprint, "0" * 64))
        np.save(array_file, blocks + 1)
    elif part == "broken header":
        header_file.write_text("{")
    else:
        header_file.unlink()
    assert np.array_equal(prepare_blocks(text, "train", tokenizer, 32, cache), blocks)
    assert tokenizer.fingerprint in header_file.read_text()


def _prepare(text, cache, results):
    results.put(prepare_blocks(text, "train", Tokenizer.load(None), 32, cache).sum())


def test_several_processes_prepare_at_once(text, tmp_path):
    cache, context = tmp_path / "cache", multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(text, cache, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {prepare_blocks(text, "train", Tokenizer.load(None), 32, tmp_path / "alone").sum()}
    assert len(list(cache.iterdir())) == 2, "no temporary file is left"


def test_too_little_text_and_a_cache_that_is_no_folder(text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a word\n\nanother")
    with pytest.raises(UserError, match="does not fill one block of 32 tokens"):
        prepare_blocks(short, "train", Tokenizer.load(None), 32, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        prepare_blocks(text, "train", Tokenizer.load(None), 32, short)
