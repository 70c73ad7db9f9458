"""Corpora: formats, the split, and what is said when they are not right."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data import corpus
from imdm_scale.data.corpus import corpus_hash, read_documents
from imdm_scale.errors import UserError

DOCUMENTS = ["first\n\ndocument", "second", "  ", "third — ü"]


def jsonl(documents):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))


def both_splits(path):
    return list(read_documents(path, "train")), list(read_documents(path, "valid"))


def test_embedded_corpus_has_six_novels_worth_of_text_and_disjoint_splits():
    train, valid = both_splits(None)
    assert (len(train), len(valid)) == (872, 45)
    assert sum(map(len, train)) > 7_000_000
    assert not set(train) & set(valid)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)], ids=str
)
def test_formats(tmp_path, suffix, compress):
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(compress(jsonl(DOCUMENTS).encode()))
    assert both_splits(lines) == (["first\n\ndocument", "second"], ["third — ü"])
    text = tmp_path / f"b.txt{suffix}"
    text.write_bytes(compress(b"\n\none\nline\n\n \n two\n\nthree"))
    assert both_splits(text) == (["one\nline", " two"], ["three"])


def test_folder_is_read_by_name_and_each_text_file_in_it_is_one_document(tmp_path):
    (tmp_path / "b.jsonl").write_text(jsonl(["in lines", "last"]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one\n\nwith a paragraph\n")
    (tmp_path / "README.md").write_text("no document")
    assert both_splits(tmp_path) == (["one\n\nwith a paragraph", "in lines"], ["last"])


@given(st.integers(2, 450))
def test_last_hundredth_is_held_out(number):
    with pytest.MonkeyPatch.context() as patch:
        documents = [str(i) for i in range(number)]
        patch.setattr(corpus, "_all_documents", lambda path: iter(documents))
        train, valid = both_splits("any")
    assert train + valid == documents
    assert len(valid) == max(1, number // 100)


def test_hash_follows_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    before = corpus_hash(path, "train")
    assert before == corpus_hash(path, "train")
    path.write_text("one\n\ntwi")
    assert corpus_hash(path, "train") != before
    assert corpus_hash(None, "train") != corpus_hash(None, "valid")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"x", "not of a known format"),
        ("a.jsonl", b'{"text": "x"}\n{"text": oops}\n', r"line 2, column 10: not valid JSON"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', r"fields \['body', 'id'\]"),
        ("a.jsonl", b'{"text": 3}\n', "as a string"),
        ("a.jsonl", b"[1]\n", "seen a list"),
        ("a.jsonl", b"", r"0 document\(s\)"),
        ("a.txt", b"only one\nparagraph\n", r"1 document\(s\).*blank lines"),
        ("a.txt", b"caf\xe9\n\nx\n", "not UTF-8"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"some text " * 50)[:-12], "cannot be read"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        list(read_documents(path, "train"))
    assert name in str(raised.value)


def test_no_such_path_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_documents(tmp_path / "none.txt", "train"))
    with pytest.raises(UserError, match="folder without files of a known format"):
        list(read_documents(tmp_path, "valid"))
