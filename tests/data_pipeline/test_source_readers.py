"""Readers of files of text: every text comes out as it is, whatever the size of the blocks; faults are placed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imdm_scale.data import source_readers
from imdm_scale.data.source_readers import count_parquet_rows, kind_of, read_texts
from imdm_scale.errors import UserError

COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LINES = st.text(st.sampled_from(["a", "é", " ", "\t", "\n", "\n"]), max_size=60)
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(file, column="text", unit="paragraph"):
    kind = kind_of(file)
    return [text for texts in read_texts(file, kind, column, unit) for text in texts.to_pylist()]


@pytest.fixture(params=[4, 7, 1 << 20], ids="blocks of {}".format)
def blocks(request, monkeypatch):
    """Bytes that are read at a time: with few of them every line is cut."""
    monkeypatch.setattr(source_readers, "BLOCK_BYTES", request.param)


@one_folder
@given(texts=st.lists(TEXT), ascii_only=st.booleans())
def test_json_lines_and_an_array_come_out_as_they_went_in(blocks, tmp_path, texts, ascii_only):
    records = [{"n": i, "text": text, "more": {"text": [i]}} for i, text in enumerate(texts)]
    dumped = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join(dumped), "utf-8")
    assert read(tmp_path / "a.jsonl") == texts
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=ascii_only, indent=1), "utf-8")
    assert read(tmp_path / "a.json") == texts
    (tmp_path / "b.json").write_text("".join(line + "\r\n\n" for line in dumped), "utf-8", newline="")
    assert read(tmp_path / "b.json") == texts


@one_folder
@given(content=LINES, newline=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans())
def test_units_of_a_text_file(blocks, tmp_path, content, newline, mark):
    file = tmp_path / "a.txt"
    file.write_text(content, "utf-8-sig" if mark else "utf-8", newline=newline)
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", f"\n\n{content}\n\n")
    assert read(file, unit="paragraph") == [text for text in paragraphs if text.strip()]
    assert read(file, unit="line") == (content.removesuffix("\n").split("\n") if content else [])
    assert read(file, unit="document") == [content.rstrip("\n")]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_of_several_frames(blocks, tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compress(b'{"text": "one"}\n{"te') + compress(b'xt": "two"}\n'))
    assert read(file) == ["one", "two"]


def test_fields_beside_the_text_may_differ_at_will(tmp_path):
    file = tmp_path / "a.jsonl"
    others = ['"x": 1', '"x": "a"', '"x": {"y": [null]}', '"z": [1, "a"]', '"x": "\\ud800"', '"x": 1, "x": 2']
    file.write_text("".join(f'{{"body": "text {i}", {other}}}\n' for i, other in enumerate(others)))
    assert read(file, "body") == [f"text {i}" for i in range(len(others))]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_columns(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(source_readers, "PARQUET_ROWS", 2)
    table = pa.table({"n": [1, 2, 3, 4, 5], "body": pa.array(["a", "b", "", "a", "é"]).cast(kind)})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert read(tmp_path / "a.parquet", "body") == ["a", "b", "", "a", "é"]
    assert count_parquet_rows(tmp_path / "a.parquet") == 5


GOOD = b'{"text": "good"}\n'
FAULTS = [
    ("a.jsonl", GOOD + b'{"text": oops}\n', r"line 2, column 10: not valid JSON"),
    ("a.jsonl", GOOD + b'\n{"text": "x"\n', r"line 3, .*not valid JSON"),
    ("a.jsonl", GOOD + b'{"body": "x", "id": 3}\n', r"line 2: expected .* seen the fields \['body', 'id'\]"),
    ("a.jsonl", GOOD + b'{"text": 3}\n', r"line 2: .*string under \"text\", seen 3 there"),
    ("a.jsonl", GOOD + b'{"text": null}\n', r"line 2: .*seen null there"),
    ("a.jsonl", GOOD + b"[1]\n", "line 2: .*seen a list"),
    ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "line 2 is not UTF-8 .*byte 0xe9"),
    ("a.jsonl", GOOD + b'{"text": "\\ud83d"}\n', "line 2: .*half a surrogate pair"),
    ("a.json", b'[{"text": "x"},\n {"text": y}]', "line 2, column 11: not valid JSON"),
    ("a.json", b'[{"text": "x"}, {"body": "y"}]', "record 2: expected"),
    ("a.json", b'{\n "data": []\n}', "line 1, .*one array of objects"),
    ("a.txt", b"fine\n\ncaf\xe9\n\nx\n", "line 3 is not UTF-8 .*byte 0xe9"),
    ("a.parquet", b"PAR1 but no more", "cannot be read"),
    ("a.jsonl.gz", b"no gzip", "cannot be read"),
    *((f"a.txt{s}", c(b"some text " * 50)[:-9], "cannot be read") for s, c in COMPRESSORS.items() if s),
]


@pytest.mark.parametrize(("name", "content", "said"), FAULTS)
def test_faults_are_placed(blocks, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"txt": ["a"], "n": [1]}, r'has no column "text", but \[\'txt\', \'n\'\]; did you mean txt'),
        ({"text": [1]}, r'column "text" holds int64'),
        ({"text": [["a"]], "body": ["a"]}, r"holds list.*columns with text are \['body'\]"),
        ({"text": ["a", "b", None]}, r"row 2 .*null"),
        ({"text": pa.array([b"caf\xe9"]).view(pa.string())}, "cannot be read .*UTF8"),
    ],
)
def test_faults_of_parquet(tmp_path, monkeypatch, columns, said):
    monkeypatch.setattr(source_readers, "PARQUET_ROWS", 2)
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table(columns), file)
    with pytest.raises(UserError, match=said) as raised:
        read(file)
    assert str(file) in str(raised.value)


def test_kinds_by_name(tmp_path):
    kinds = {"a.b.JSONL": "json", "a.json.GZ": "json", "a.txt.zst": "text", "a.txt.parquet": "parquet"}
    assert {name: kind_of(tmp_path / name) for name in kinds} == kinds
    assert {kind_of(tmp_path / name) for name in ("a", "a.csv", "a.gz", "a.parquet.gz", "a.txt.zip")} == {
        None
    }
