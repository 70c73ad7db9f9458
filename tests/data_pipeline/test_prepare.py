"""Preparation of shards: the bytes, what is refused, what is reported. Interruptions: test_prepare_interrupted.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import multiprocessing
import os
import resource
import signal
from itertools import pairwise

import datasets
import numpy as np
import pytest

from imdm_scale.assets import CORPUS
from imdm_scale.data import prepare as prepare_module
from imdm_scale.data.manifest import Manifest
from imdm_scale.data.prepare import PrepareOptions, Progress, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from tests.data_pipeline.test_packing import reference_blocks

TOKENIZER = load_tokenizer(None)
SMALL = PrepareOptions(length=16, documents_per_group=20, shard_bytes=1000)


def texts_of(split):
    with lzma.open(CORPUS[split], "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


TEXTS = [text for document in texts_of("valid")[:12] for text in document.split("\n\n")][:90]
TEXTS[3], TEXTS[17] = "", " \n\t"


class FakeDocuments:
    """`sources.Documents` of a list."""

    def __init__(self, texts, identity="", num_documents=None):
        self.texts, self.num_documents = texts, num_documents
        self.identity = identity or hashlib.sha256(repr(texts).encode()).hexdigest()

    def batches(self, start, size):
        for first in range(start, len(self.texts), size):
            yield self.texts[first : first + size]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Leaves the user's cache of `datasets` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def source(monkeypatch):
    """A function that sets the documents of the splits; by default some text in both. Small batches."""

    def texts(train=TEXTS, valid=TEXTS[:20], **how):
        documents = {
            name: given if given is None else FakeDocuments(given, **how)
            for name, given in (("train", train), ("valid", valid))
        }
        monkeypatch.setattr(prepare_module, "open_documents", lambda spec, split: documents[split])

    monkeypatch.setattr(prepare_module, "CHARACTERS_PER_BATCH", 500)
    monkeypatch.setattr(prepare_module, "ROWS_PER_READ", 7)
    texts()
    return texts


def prepared(out, options=SMALL, spec=SourceSpec("text"), tokenizer=TOKENIZER, **how):  # noqa: B008
    return prepare(spec, tokenizer, options, out, **how)


def files_of(folder):
    """Content of all files by name; folders have None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


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


def interrupted(out, **how):
    """Lets a preparation end by an interrupt of its first report after `blocks` blocks of the training split."""

    def interrupt(progress):
        if progress.split == "train" and progress.blocks > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(out, report=interrupt, **how)


@pytest.fixture
def report_always(monkeypatch):
    monkeypatch.setattr(prepare_module, "REPORT_SECONDS", 0)


OTHERS = [
    ({"length": 17}, {}, "length 16, but length is now 17"),
    ({"packing": "plain"}, {}, "packing wrapped, but packing is now plain"),
    ({"documents_per_group": 1000}, {}, "documents_per_group 20, but documents_per_group is now 1000"),
    ({"document_eos": False}, {}, "document_eos True, but document_eos is now False"),
    ({"shard_bytes": 3000}, {}, "shard_bytes 1000, but shard_bytes is now 3000"),
    ({"shuffle_window": 2}, {}, "shuffle_window 8, but shuffle_window is now 2"),
    ({}, {"path": "other"}, r"source\.path text, but source\.path is now other"),
    ({}, {"detokenizer": "ptb"}, r"source\.detokenizer none, but source\.detokenizer is now ptb"),
]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(("options", "spec", "message"), OTHERS)
def test_other_choices_in_the_same_folder(tmp_path, source, report_always, state, options, spec, message):
    if state == "finished":
        prepared(tmp_path)
    else:
        interrupted(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=f"holds data prepared with {message}"):
        prepared(tmp_path, dataclasses.replace(SMALL, **options), SourceSpec(**{"path": "text", **spec}))
    after = files_of(tmp_path)
    after.pop(".lock", None)
    before.pop(".lock", None)
    assert after == before


def test_another_tokenizer_in_the_same_folder(tmp_path, source):
    prepared(tmp_path)
    other = load_tokenizer(None)
    other.fingerprint = "0" * 64
    with pytest.raises(
        UserError, match=r"tokenizer\.fingerprint \w{64}, but tokenizer\.fingerprint is now 0000"
    ):
        prepared(tmp_path, tokenizer=other)


def test_other_choices_take_the_place_of_a_try_that_finished_nothing(tmp_path, source):
    source(train=["a few words"], valid=TEXTS[:1])
    options = dataclasses.replace(SMALL, length=4000)
    with pytest.raises(UserError, match="The valid split of text does not fill one block of 4000 tokens"):
        prepared(tmp_path / "out", options)
    source()
    prepared(tmp_path / "out")
    prepared(tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_changed_text(tmp_path, source, report_always):
    interrupted(tmp_path)
    source(train=[*TEXTS, "and more"])
    with pytest.raises(UserError, match="text of the train split is not what it was when its preparation in"):
        prepared(tmp_path)
    source(valid=None)
    with pytest.raises(UserError, match="text of the valid split is not what it was"):
        prepared(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "short", "missing"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_finished_shard_is_checked_before_it_is_trusted(
    tmp_path, source, report_always, caplog, damage, number
):
    prepared(tmp_path / "undisturbed")
    interrupted(tmp_path / "out")
    file = tmp_path / "out" / "train" / f"0000{number}.npy"
    content = file.read_bytes()
    if damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "short":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    prepared(tmp_path / "out")
    assert f"train/0000{number}.npy" in caplog.text
    assert "made again" in caplog.text
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_finished_shards_are_not_made_again(tmp_path, source, report_always):
    interrupted(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(before) > 8
    first: list[Progress] = []
    prepared(tmp_path, report=first.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert first[0].split == "train", "the validation split was finished"
    assert first[0].tokens > first[0].tokens_before > 0


def test_foreign_files(tmp_path, source):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds files that no preparation left there \(thesis\.tex\)"):
        prepared(tmp_path)
    assert list(files_of(tmp_path)) == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex cannot be written \(File exists\)"):
        prepared(tmp_path / "thesis.tex")


def test_a_broken_progress_file(tmp_path, source, report_always):
    interrupted(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"progress\.json.* cannot be understood \(KeyError"):
        prepared(tmp_path)


def test_two_at_once(tmp_path, source, report_always):
    refused = []

    def prepare_too(progress):
        if not refused:
            with pytest.raises(UserError, match="is being prepared by another process") as refusal:
                prepared(tmp_path / "out")
            refused.append(refusal)

    prepared(tmp_path / "out", report=prepare_too)
    assert refused
    prepared(tmp_path / "alone")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_a_lock_left_by_a_dead_process_does_not_hold(tmp_path, source):
    (tmp_path / ".lock").touch()
    prepared(tmp_path)
    assert ".lock" not in files_of(tmp_path)


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
