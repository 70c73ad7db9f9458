"""Sources that are not right, or not there: what is said, and that it names what to mend."""

from __future__ import annotations

import errno
import gzip
import os
import socket

import datasets
import pytest
import zstandard

from imdm_scale.data import source_hub
from imdm_scale.data.sources import SourceSpec, open_documents
from imdm_scale.errors import UserError
from tests.data_pipeline.source_reading import jsonl, no_network, own_cache, read, whole

__all__ = ["no_network", "own_cache"]


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


def test_hub_that_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(source_hub, "ANSWER_SECONDS", 0.1)
        with pytest.raises(UserError, match=r"cannot be reached .*timed out"):
            open_documents(SourceSpec("nobody/nothing"), "train")
