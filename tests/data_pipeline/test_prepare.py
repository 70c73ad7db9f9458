"""Preparation of shards: the bytes, what is refused, what is reported. Interruptions: test_prepare_interrupted.py;
folders with something in them: test_prepare_again.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import signal
from itertools import pairwise

import numpy as np
import pytest

from imdm_scale.data import prepare as prepare_module
from imdm_scale.data.manifest import Manifest
from imdm_scale.data.prepare import PrepareOptions, Progress, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from tests.data_pipeline.preparing import (
    SMALL,
    TEXTS,
    TOKENIZER,
    files_of,
    own_cache,
    prepared,
    report_always,
    source,
    texts_of,
)
from tests.data_pipeline.test_packing import reference_blocks

__all__ = ["own_cache", "report_always", "source"]


def blocks_of(out, manifest, split):
    return np.concatenate([np.load(out / shard.file) for shard in manifest.splits[split].shards])


def layout_of(options, tokenizer=TOKENIZER):
    return prepare_module.BlockLayout(
        options.packing,
        options.length,
        options.documents_per_group,
        options.document_eos,
        tokenizer.bos_id,
        tokenizer.eos_id,
        "uint16",
    )


def expected_blocks(texts, options, tokenizer=TOKENIZER):
    rows = [tokenizer.encode(text) if text.strip() else None for text in texts]
    return reference_blocks(layout_of(options), rows)


@pytest.mark.parametrize("packing", ["wrapped", "plain", "document"])
@pytest.mark.parametrize("documents_per_group", [0, 20])
def test_blocks_are_those_of_the_reference(tmp_path, source, packing, documents_per_group):
    options = dataclasses.replace(SMALL, packing=packing, documents_per_group=documents_per_group)
    manifest = prepared(tmp_path / "out", options)
    assert len(manifest.splits["train"].shards) > 2
    for split, texts in (("train", TEXTS), ("valid", TEXTS[:20])):
        blocks = blocks_of(tmp_path / "out", manifest, split)
        assert blocks.dtype == "uint16"
        assert blocks.tolist() == expected_blocks(texts, options)
        assert manifest.splits[split].num_documents == len(texts) - 2


def test_the_manifest_describes_the_files(tmp_path, source):
    out = tmp_path / "deep" / "out"
    manifest = prepared(out)
    assert Manifest.from_json((out / "manifest.json").read_text(), str(out)) == manifest
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    assert set(files_of(out)) == {
        "manifest.json",
        "tokenizer",
        "tokenizer/tokenizer.model",
        "tokenizer/tokenizer_config.json",
        "train",
        "valid",
        *(shard.file for shard in shards),
    }
    for shard in shards:
        content = (out / shard.file).read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert shard.num_blocks == len(np.load(out / shard.file))
        assert shard.num_bytes <= SMALL.shard_bytes
    ids = [len(TOKENIZER.encode(text)) + 1 for text in TEXTS if text.strip()]
    train = manifest.splits["train"]
    assert train.num_tokens == sum(ids)
    assert train.num_tokens - train.num_dropped == train.num_blocks * (SMALL.length - 2)
    assert load_tokenizer(out / "tokenizer").fingerprint == manifest.tokenizer.fingerprint
    assert (manifest.length, manifest.shuffle_window, manifest.dtype) == (16, 8, "uint16")


def test_a_file_of_text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    spec = SourceSpec(str(file), train="train[:70]", valid="train[70:]")
    manifest = prepared(tmp_path / "out", spec=spec)
    for split, texts in (("train", TEXTS[:70]), ("valid", TEXTS[70:])):
        assert blocks_of(tmp_path / "out", manifest, split).tolist() == expected_blocks(texts, SMALL)


def test_the_embedded_corpus(tmp_path):
    options = PrepareOptions(length=64, documents_per_group=0)
    manifest = prepare(SourceSpec(), TOKENIZER, options, tmp_path / "out")
    for split in ("train", "valid"):
        expected = expected_blocks(texts_of(split), options)
        assert np.array_equal(blocks_of(tmp_path / "out", manifest, split), expected)


def test_any_number_of_workers_and_any_batches_give_the_same_bytes(tmp_path, source, monkeypatch):
    prepared(tmp_path / "alone")
    expected = files_of(tmp_path / "alone")
    for workers in (2, 3):
        prepared(tmp_path / f"{workers}", workers=workers)
        assert files_of(tmp_path / f"{workers}") == expected
    monkeypatch.setattr(prepare_module, "CHARACTERS_PER_BATCH", 1)
    monkeypatch.setattr(prepare_module, "ROWS_PER_READ", 1000)
    prepared(tmp_path / "one by one")
    assert files_of(tmp_path / "one by one") == expected
    assert multiprocessing.active_children() == []


def test_a_large_vocabulary_has_wider_ids(tmp_path, source, monkeypatch):
    class Large:
        """The embedded tokenizer with other ids."""

        vocab_size, mask_id, bos_id, eos_id = 100_000, 99_999, 70_001, 70_002
        fingerprint, save = "f" * 64, TOKENIZER.save

        def encode_batch(self, texts):
            return [[70_003 + i for i in ids] for ids in TOKENIZER.encode_batch(texts)]

    manifest = prepared(tmp_path / "out", tokenizer=Large())
    blocks = blocks_of(tmp_path / "out", manifest, "train")
    assert manifest.dtype == "uint32"
    assert blocks.dtype == "uint32"
    narrow = expected_blocks(TEXTS, SMALL)
    assert blocks[0, 1:4].tolist() == [70_003 + i for i in narrow[0][1:4]]


def test_one_split_alone(tmp_path, source):
    source(valid=None)
    assert list(prepared(tmp_path / "train").splits) == ["train"]
    source(train=None, valid=TEXTS)
    assert list(prepared(tmp_path / "valid").splits) == ["valid"]
    source(train=None, valid=None)
    with pytest.raises(UserError, match="train and valid are both none"):
        prepared(tmp_path / "none")


def test_a_finished_folder_is_not_looked_into_again(tmp_path, source, monkeypatch):
    manifest = prepared(tmp_path)
    before = files_of(tmp_path)
    (tmp_path / "histogram.png").touch()  # somebody's own
    monkeypatch.delattr(prepare_module, "open_documents")
    assert prepared(tmp_path) == manifest
    assert prepared(tmp_path, spec=SourceSpec("text", streaming=True)) == manifest
    assert files_of(tmp_path) == {**before, "histogram.png": b""}


class RefusesMost:
    """A tokenizer that refuses some texts."""

    def encode_batch(self, texts):
        if any("plover" in text for text in texts):
            raise ValueError("unknown magic")
        return TOKENIZER.encode_batch(texts)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(TOKENIZER, name)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_the_tokenizer_refuses(tmp_path, source, workers):
    source([*TEXTS[:61], "say plover", *TEXTS[61:]])
    with pytest.raises(UserError) as refusal:
        prepared(tmp_path / "out", tokenizer=RefusesMost(), workers=workers)
    assert "Document 61 of the train split" in str(refusal.value)
    assert "(ValueError: unknown magic)" in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert multiprocessing.active_children() == []
    assert list((tmp_path / "out" / "valid").glob("*.npy"))


def test_too_little_text(tmp_path, source):
    source(["", " \n"], None)
    with pytest.raises(UserError, match=r"train split of text holds no document with text \(in 2 rows\)"):
        prepared(tmp_path / "a")
    source(["a few words"], None)
    with pytest.raises(
        UserError, match=r"does not fill one block of 16 tokens \(it has 4\); give more .*blocks\.$"
    ):
        prepared(tmp_path / "b")
    source(["a few words"] * 50, None)
    with pytest.raises(UserError, match=r"does not fill one block .* or set documents_per_group to 0"):
        prepared(tmp_path / "c", dataclasses.replace(SMALL, documents_per_group=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2}, "length is 2, but must be at least 3 with packing wrapped"),
        ({"length": 0, "packing": "plain"}, "length is 0, but must be at least 1"),
        ({"packing": "bag"}, "packing is bag, but must be one of wrapped, plain, document"),
        ({"documents_per_group": -1}, "documents_per_group is -1"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"shuffle_window": 0}, "shuffle_window is 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        PrepareOptions(**options)


def test_workers_out_of_range(tmp_path, source):
    with pytest.raises(UserError, match="workers is 0"):
        prepared(tmp_path, workers=0)


def test_reports(tmp_path, source, report_always):
    source(num_documents=90)
    reports: list[Progress] = []
    manifest = prepared(tmp_path, report=reports.append)
    by_split = {name: [r for r in reports if r.split == name] for name in ("valid", "train")}
    assert reports == by_split["valid"] + by_split["train"]
    for name, told in by_split.items():
        split = manifest.splits[name]
        assert (told[-1].tokens, told[-1].blocks) == (split.num_tokens, split.num_blocks)
        assert len(told) > 3
        for earlier, later in pairwise(told):
            assert earlier.documents <= later.documents
            assert earlier.seconds <= later.seconds
    assert by_split["train"][-1].documents == by_split["train"][-1].total == 90


def test_reports_are_seldom(tmp_path, source, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(prepare_module.time, "monotonic", lambda: next(clock) * 0.1)
    reports: list[Progress] = []
    source(valid=None)
    prepared(tmp_path, report=reports.append)
    assert len(reports) > 3
    for earlier, later in pairwise(reports[:-1]):
        assert 0.5 <= later.seconds - earlier.seconds < 0.75


def _prepare_on_a_full_disk(out):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_the_disk(progress):
        if progress.split == "train" and progress.blocks > 200:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))

    try:
        prepared(out, report=fill_the_disk)
    except UserError as error:
        os._exit(3 if "cannot be written (File too large)" in str(error) else 4)


def test_a_full_disk(tmp_path, source, report_always):
    """A limit on the size of files stands for it: writing a shard, which has 1000 bytes, ends in an OSError."""
    prepared(tmp_path / "undisturbed")
    out = tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(target=_prepare_on_a_full_disk, args=(out,))
    child.start()
    child.join()
    assert child.exitcode == 3
    assert not list(out.rglob("*.partial"))
    assert len(list(out.rglob("*.npy"))) > 5
    prepared(out)
    assert files_of(out) == files_of(tmp_path / "undisturbed")
