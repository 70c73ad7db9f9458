"""Sources: every local kind, mapped into memory and streamed, from anywhere; what is said when they are not right."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import pickle
import socket

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.data import source_hub
from imdm_scale.data.detokenizers import DETOKENIZERS
from imdm_scale.data.sources import SourceSpec, open_documents
from imdm_scale.errors import UserError

COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
TEXTS = ["first\n\ndocument", "second", "  ", "", "fünfter , so"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Leaves the user's cache of `datasets` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses, and counts against the test, whatever leaves this machine."""
    attempts = []

    def connect(self, address, connect=socket.socket.connect):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            attempts.append(address)
            raise ConnectionRefusedError(address)
        return connect(self, address)

    def getaddrinfo(host, *args, getaddrinfo=socket.getaddrinfo, **kwargs):
        if host not in ("127.0.0.1", "::1"):
            attempts.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "no names here")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    assert not attempts


def jsonl(texts, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def read(spec, split="train", start=0, size=3):
    batches = list(open_documents(spec, split).batches(start, size))
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)
    return [text for batch in batches for text in batch]


def whole(path, **settings):
    """All documents of a local source, the same whether it is streamed or not."""
    spec = {"path": str(path), "train": "train", "valid": "none", **settings}
    streamed, mapped = read(SourceSpec(**spec, streaming=True)), read(SourceSpec(**spec))
    assert streamed == mapped
    return mapped


def both_splits(path, **settings):
    return tuple(read(SourceSpec(str(path), **settings), split) for split in ("train", "valid"))


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


def test_rows_without_text_are_named_where_they_are_read(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b", None], "n": [1, 2, 3]})
    table.save_to_disk(tmp_path / "a")
    spec = SourceSpec(str(tmp_path / "a"), train="train", valid="none")
    with pytest.raises(UserError, match=r"split train of the source .*: row 2 \(counted from 0\) holds null"):
        read(spec, size=2)
    with pytest.raises(
        UserError, match=r"column \"n\" holds int64, not text; columns with text are \['text'\]"
    ):
        whole(tmp_path / "a", text_column="n")
    with pytest.raises(UserError, match=r"has no column \"txt\", but \['text', 'n'\]; did you mean text"):
        whole(tmp_path / "a", text_column="txt")


GOOD = jsonl(["good"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"x", "not of a known format; known are .jsonl, .jsonl.gz"),
        ("a.jsonl", GOOD + b'{"text": oops}\n', "line 2, column 10: not valid JSON"),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 3}\n', r"line 2: .*fields \['body', 'id'\]"),
        ("a.txt", b"caf\xe9\n\nx\n", "line 1 is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"some text " * 50)[:-12], "cannot be read"),
        ("a.txt.zst", zstandard.compress(b"some text " * 50)[:-12], "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, said, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        read(SourceSpec(str(path), streaming=streaming, train="train", valid="none"))
    assert name in str(raised.value)
    assert not datasets.utils.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "content", "number"), [("a.jsonl", b"", 0), ("a.txt", b"only one\nparagraph\n", 1)]
)
def test_too_few_documents(tmp_path, name, content, number):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"There are {number} document\(s\) in the source .*{name}, and at least 2"
    ):
        open_documents(SourceSpec(str(tmp_path / name)), "valid")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "nothing.txt"}, "path is .*nothing.txt, which does not exist; did you mean noting.txt"),
        ({"path": "no/such/folder"}, "there is no folder .*the path exists up to"),
        ({"path": "empty"}, "folder without files of a known format"),
        ({"path": "mixed"}, r"files of several kinds \(2 json, 1 text\)"),
        ({"path": "dangling"}, "b.txt is a link to .*, which is not there"),
        ({"path": "saved"}, "save_to_disk wrote it, but cannot be loaded"),
        ({"path": "noting.txt", "name": "plain"}, "name is 'plain', but the source .* has no configurations"),
        (
            {"path": "noting.txt", "text_column": "body"},
            "text_column is 'body', but .* plain text, without columns",
        ),
        (
            {"path": "noting.txt", "text_unit": "word"},
            "text_unit is 'word', but must be one of line, paragraph",
        ),
        (
            {"path": "noting.txt", "detokenizer": "wikitxt"},
            "detokenizer is 'wikitxt', .* did you mean wikitext",
        ),
        (
            {"path": "noting.txt", "train": "training", "valid": "none"},
            "split 'training', .*did you mean train",
        ),
        ({"path": "mixed/a.jsonl", "text_unit": "line"}, "text_unit is 'line', but .* is no plain text"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, said):
    for folder in ("empty", "mixed", "dangling", "saved"):
        (tmp_path / folder).mkdir()
    (tmp_path / "noting.txt").write_text("one\n\ntwo")
    for name in (
        "mixed/a.jsonl",
        "mixed/b.json",
        "mixed/c.txt",
        "saved/state.json",
        "saved/dataset_info.json",
    ):
        (tmp_path / name).write_text("not JSON")
    (tmp_path / "dangling" / "b.txt").symlink_to(tmp_path / "away.txt")
    with pytest.raises(UserError, match=said):
        open_documents(SourceSpec(**{**settings, "path": str(tmp_path / settings["path"])}), "train")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"cache of datasets, .*file/cache, cannot be written .*HF_HOME"):
        open_documents(SourceSpec(str(tmp_path / "a.txt")), "train")

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
    with pytest.raises(
        UserError, match=r"cannot be written .*No space left.*make room there, or set .*HF_HOME"
    ):
        open_documents(SourceSpec(str(tmp_path / "a.txt")), "train")


@pytest.fixture
def closed_port():
    """The address of a port of this machine at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def online(monkeypatch):
    """The libraries try the network, also where the environment says that there is none."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_that_cannot_be_reached(tmp_path, monkeypatch, closed_port, streaming):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", closed_port)
    with pytest.raises(
        UserError, match=r"path is nobody/nothing, .*taken for a dataset .*cannot be reached .*refused"
    ):
        open_documents(SourceSpec("nobody/nothing", streaming=streaming), "train")
    (tmp_path / "corpora").mkdir()
    with pytest.raises(UserError, match=r"path is corpra, which does not exist here \(only corpora\)"):
        open_documents(SourceSpec("corpra", streaming=streaming), "train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be reached .HF_HUB_OFFLINE is set"):
        open_documents(SourceSpec("nobody/nothing", streaming=streaming), "train")


@pytest.mark.usefixtures("online")
def test_hub_that_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(source_hub, "ANSWER_SECONDS", 0.1)
        with pytest.raises(UserError, match=r"cannot be reached .*timed out"):
            open_documents(SourceSpec("nobody/nothing"), "train")


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
