"""Sources: every local kind, mapped into memory and streamed, from anywhere. Mistakes: test_sources_refused.py."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.data.detokenizers import DETOKENIZERS
from imdm_scale.data.sources import SourceSpec, open_documents
from imdm_scale.errors import UserError
from tests.data_pipeline.source_reading import both_splits, jsonl, no_network, own_cache, read, whole

__all__ = ["no_network", "own_cache"]

COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
TEXTS = ["first\n\ndocument", "second", "  ", "", "fünfter , so"]


def test_embedded_corpus_has_six_novels_worth_of_text_and_disjoint_splits():
    train, valid = read(SourceSpec()), read(SourceSpec(), "valid")
    assert (len(train), len(valid)) == (872, 45)
    assert sum(map(len, train)) > 7_000_000
    assert not set(train) & set(valid)
    assert read(SourceSpec(streaming=True), "valid", size=7) == valid


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_one_file(tmp_path, suffix):
    for name, content in {
        "a.jsonl": jsonl(TEXTS),
        "a.json": json.dumps([{"text": t} for t in TEXTS]).encode(),
    }.items():
        (tmp_path / (name + suffix)).write_bytes(COMPRESSORS[suffix](content))
        assert whole(tmp_path / (name + suffix)) == TEXTS
    text = tmp_path / f"b.txt{suffix}"
    text.write_bytes(COMPRESSORS[suffix](b"\n\none\nline\n\n \n two\n\nthree"))
    assert whole(text) == whole(text, text_unit="paragraph") == ["one\nline", " two", "three"]
    assert whole(text, text_unit="line") == ["", "", "one", "line", "", " ", " two", "", "three"]
    assert whole(text, text_unit="document") == ["\n\none\nline\n\n \n two\n\nthree"]


def test_text_in_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, "body"))
    pa.parquet.write_table(pa.table({"text": [1] * 5, "body": TEXTS}), tmp_path / "a.parquet")
    assert whole(tmp_path / "a.jsonl", text_column="body") == TEXTS
    assert whole(tmp_path / "a.parquet", text_column="body") == TEXTS


def test_folder_is_read_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.txt").write_text("one\n\nwith a paragraph\n")
    (tmp_path / "c.txt").write_text("two")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zero"))
    for other in ("README.md", "._c.txt", ".hidden/d.txt"):
        (tmp_path / other).write_text("---\nno: [document\n---\n")
    assert whole(tmp_path) == ["zero", "one\n\nwith a paragraph", "two"]
    assert whole(tmp_path, text_unit="paragraph") == ["zero", "one", "with a paragraph", "two"]


def test_folder_of_parquet_files(tmp_path):
    for i in range(3):
        pa.parquet.write_table(
            pa.table({"text": [f"{i} {j}" for j in range(4)]}), tmp_path / f"part-{i}.parquet"
        )
    assert whole(tmp_path) == [f"{i} {j}" for i in range(3) for j in range(4)]


@pytest.mark.parametrize(
    "files",
    [
        {"train": ["train-00000.jsonl", "train-00001.jsonl"], "valid": ["valid.jsonl"]},
        {"train": ["train/a.jsonl", "train/b.jsonl"], "valid": ["dev/a.jsonl"], "other": ["test/a.jsonl"]},
        {"train": ["owt.train.0.jsonl", "owt.train.1.jsonl"], "valid": ["owt.test.jsonl.gz"]},
    ],
)
def test_names_that_tell_splits(tmp_path, files):
    for split, names in files.items():
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            content = jsonl([f"{split} {name}"])
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    expected = tuple([f"{split} {name}" for name in files[split]] for split in ("train", "valid"))
    assert both_splits(tmp_path) == both_splits(tmp_path, streaming=True) == expected


def test_names_that_tell_no_splits_or_not_all(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    assert both_splits(tmp_path) == (["train-0.jsonl"], ["train-1.jsonl"])
    (tmp_path / "trainers.jsonl").write_bytes(jsonl(["x"]))
    assert len(whole(tmp_path)) == 3
    (tmp_path / "test.jsonl").write_bytes(jsonl(["y"]))
    with pytest.raises(UserError, match=r"tell their split \(test, train\), but trainers.jsonl does not"):
        whole(tmp_path)


def test_saved_dataset(tmp_path):
    table = datasets.Dataset.from_dict({"n": range(5), "text": TEXTS})
    table.save_to_disk(tmp_path / "one")
    assert whole(tmp_path / "one") == TEXTS
    assert both_splits(tmp_path / "one") == (TEXTS[:4], TEXTS[4:])
    table.select([4, 0, 2]).save_to_disk(tmp_path / "chosen")
    assert whole(tmp_path / "chosen") == [TEXTS[4], TEXTS[0], TEXTS[2]]
    datasets.DatasetDict(train=table, dev=table.select([1])).save_to_disk(tmp_path / "several")
    assert both_splits(tmp_path / "several") == (TEXTS, ["second"])


CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.jsonl}
- config_name: large
  data_files:
  - {split: train, path: large/train*.jsonl}
  - {split: validation, path: large/v.jsonl}
dataset_info:
- config_name: small
  splits:
  - {name: train, num_bytes: 9, num_examples: 3}
- config_name: large
  splits:
  - {name: train, num_bytes: 9, num_examples: COUNT}
  - {name: validation, num_bytes: 9, num_examples: 1}
---
"""


def hub_copy(folder, count=4):
    for name, texts in {
        "small/train": "abc",
        "large/train-0": "de",
        "large/train-1": "fg",
        "large/v": "h",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / f"{name}.jsonl").write_bytes(jsonl(texts))
    (folder / "README.md").write_text(CARD.replace("COUNT", str(count)))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_copy_of_a_repository_of_the_hub(tmp_path, streaming):
    folder = hub_copy(tmp_path / "copy")
    assert both_splits(folder, name="large", streaming=streaming) == (list("defg"), ["h"])
    ends = {"train": "train[:-1]", "valid": "train[-1:]"}
    assert both_splits(folder, name="large", streaming=streaming, **ends) == (list("def"), ["g"])
    with pytest.raises(UserError, match=r"Config name is missing.*set name to one of the configurations"):
        whole(folder)
    with pytest.raises(UserError, match=r"'tiny' not found.*small.*set name"):
        whole(folder, name="tiny")


def test_known_corpora_are_known_in_a_copy_too(tmp_path):
    folder = hub_copy(tmp_path / "openwebtext")
    with pytest.raises(
        UserError, match=r"train is 'train\[:-100000\]', but no document is left of split train"
    ):
        open_documents(SourceSpec(str(folder), name="large"), "train")
    folder = hub_copy(tmp_path / "lambada")
    assert open_documents(SourceSpec(str(folder), name="large", valid="validation"), "train") is None


def test_stream_that_ends_before_its_card_says(tmp_path):
    spec = SourceSpec(str(hub_copy(tmp_path, count=9)), name="large", streaming=True)
    with pytest.raises(UserError, match="ended at document 4, though 9 were promised"):
        read(spec)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """37 documents in three Parquet files, whose number a stream knows, and the same as JSON lines."""
    folder = tmp_path_factory.mktemp("numbered")
    texts = [f"document {i}" for i in range(37)]
    (folder / "parquet").mkdir()
    for i, part in enumerate((texts[:10], texts[10:11], texts[11:])):
        pa.parquet.write_table(
            pa.table({"text": part}), folder / "parquet" / f"{i}.parquet", row_group_size=4
        )
    (folder / "all.jsonl").write_bytes(jsonl(texts))
    return folder, texts


BOUND = st.none() | st.integers(-45, 45)


@settings(deadline=None, max_examples=40)
@given(first=BOUND, last=BOUND, percent=st.booleans(), start=st.integers(0, 40), size=st.integers(1, 15))
def test_any_part_from_anywhere_streamed_or_not(numbered, first, last, percent, start, size):
    folder, texts = numbered
    unit = "%" if percent else ""
    bounds = [None if x is None else round(x * 37 / 100) if percent else x for x in (first, last)]
    bounds = [
        37 if x == 0 and given is not None and given < 0 else x
        for x, given in zip(bounds, (first, last), strict=True)
    ]
    expected = texts[slice(*bounds)]
    shown = ["" if x is None else f"{x}{unit}" for x in (first, last)]
    for path, streaming in (("parquet", False), ("parquet", True), ("all.jsonl", False)):
        spec = SourceSpec(
            str(folder / path), streaming=streaming, train=f"train[{shown[0]}:{shown[1]}]", valid="none"
        )
        if expected:
            assert open_documents(spec, "train").num_documents == len(expected)
            assert read(spec, start=start, size=size) == expected[start:]
        else:
            with pytest.raises(UserError, match="no document is left"):
                open_documents(spec, "train")


@settings(deadline=None, max_examples=20)
@given(first=st.integers(0, 45), last=st.none() | st.integers(1, 45), start=st.integers(0, 40))
def test_stream_of_unknown_length(numbered, first, last, start):
    folder, texts = numbered
    spec = SourceSpec(
        str(folder / "all.jsonl"),
        streaming=True,
        train=f"train[{first}:{last or ''}]",
        valid="none",
        text_column="text",
    )
    if last is not None and first >= last:
        with pytest.raises(UserError, match="no document is left"):
            open_documents(spec, "train")
        return
    expected = texts[first:last]
    if not expected and start == 0:
        with pytest.raises(UserError, match=f"There is no document {first} in split train"):
            read(spec)
        return
    assert read(spec, start=start) == expected[start:]


def test_stream_that_does_not_know_its_length(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("abcdef"))
    documents = open_documents(
        SourceSpec(str(path), streaming=True, train="train[2:]", valid="train[:2]"), "train"
    )
    assert documents.num_documents is None
    assert list(documents.batches(1, 2)) == [["d", "e"], ["f"]]
    with pytest.raises(UserError, match=r"last 1%.*does not tell how many.*bounds counted from the start"):
        open_documents(SourceSpec(str(path), streaming=True), "valid")
    with pytest.raises(UserError, match=r"train is 'train\[:-1\]', where -1 needs the number of documents"):
        open_documents(SourceSpec(str(path), streaming=True, train="train[:-1]", valid="none"), "train")


def test_documents_are_detokenised_and_survive_pickling(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    spec = SourceSpec(str(tmp_path / "a.jsonl"), detokenizer="lm1b", train="train", valid="none")
    documents = pickle.loads(pickle.dumps(open_documents(spec, "train")))
    assert list(documents.batches(3, 9)) == [["", "fünfter, so"]]
    assert documents.num_documents == 5
    assert open_documents(spec, "valid") is None


def test_identity_follows_content_and_choice(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\n3\n")
    os.utime(path, ns=(1, 1))

    def seen(split="train", **settings):
        documents = open_documents(SourceSpec(str(path), **settings), split)
        return documents.identity, next(documents.batches(0, 9))

    before, texts = seen()
    assert texts == ["one", "two"] and seen() == (before, texts)
    others = [
        seen("valid"),
        seen(text_unit="line"),
        seen(detokenizer="ptb"),
        seen(train="train[:1]", valid="none"),
    ]
    path.write_text("one\n\ntwi\n\n3\n")
    os.utime(path, ns=(1, 2))
    after = seen()
    assert after[1] == ["one", "twi"], "the cache served the old file"
    assert len({before, after[0], *(identity for identity, _ in others)}) == 6


@pytest.mark.parametrize("bars", [True, False])
def test_bars_and_log_of_the_library_are_as_before(tmp_path, capfd, bars):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    verbosity = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(datasets.logging.DEBUG)
        if not bars:
            datasets.disable_progress_bars()
        assert whole(tmp_path / "a.txt") == ["one", "two"]
        assert datasets.utils.are_progress_bars_disabled() is not bars
        assert datasets.logging.get_verbosity() == datasets.logging.DEBUG
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.enable_progress_bars()
    captured = capfd.readouterr()
    assert "examples" not in captured.err and "Generating" not in captured.err


def test_all_detokenizers_can_be_chosen(tmp_path):
    (tmp_path / "a.txt").write_text("It 's .\n\ntwo")
    for name, detokenize in DETOKENIZERS.items():
        assert read(SourceSpec(str(tmp_path / "a.txt"), detokenizer=name)) == [detokenize("It 's .")]
