"""Files of text: from one file to the texts in it.

A `.jsonl` file holds one object a line with the text in one field; a `.json` file holds the same, or one array of
such objects. A `.parquet` file holds the text in one column. A `.txt` file holds a text a line, texts separated by
blank lines, or one text. All but `.parquet`, which compresses by itself, may be compressed.

Whatever cannot be read is named down to the line or row.
"""

from __future__ import annotations

import codecs
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from imdm_scale.config.nearest import did_you_mean
from imdm_scale.errors import UserError

Kind = Literal["json", "text", "parquet"]
Unit = Literal["line", "paragraph", "document"]

KINDS: dict[str, Kind] = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
"""Suffix to codec; pyarrow knows all but the last."""
SUFFIXES = tuple(
    suffix + compression
    for suffix, kind in KINDS.items()
    for compression in ("", *(() if kind == "parquet" else COMPRESSIONS))
)

BLOCK_BYTES = 8 << 20
"""Bytes of a file that are read at a time: large enough for full speed, small enough to forget."""
PARQUET_ROWS = 4096
"""Rows of a Parquet file that are decoded at a time."""


def kind_of(file: Path) -> Kind | None:
    """What a file holds, by its name; None if the name does not say."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = KINDS.get("".join(suffixes[-2:-1] if compressed else suffixes[-1:]))
    return None if compressed and kind == "parquet" else kind


def read_texts(file: Path, kind: Kind, column: str, unit: Unit) -> Iterator[pa.Array]:
    """Yields the texts of a file in order, a few MB at a time.

    Args:
        column: the field or column with the text; text files have none.
        unit: what is one text of a text file.

    Yields:
        Arrays of large_string without nulls.

    Raises:
        UserError: the file is not what its name says, or has no text where `column` says.
    """
    if kind == "json":
        return _json_texts(file, column)
    if kind == "parquet":
        return _parquet_texts(file, column)
    return {"line": _lines, "paragraph": _paragraphs, "document": _document}[unit](file)


def count_parquet_rows(file: Path) -> int:
    """Number of rows of a Parquet file, from its footer.

    Raises:
        UserError: it is no Parquet file.
    """
    with _readable(file):
        return pyarrow.parquet.read_metadata(file).num_rows


def _json_texts(file: Path, column: str) -> Iterator[pa.Array]:
    blocks = _line_blocks(file)
    for first_line, block in blocks:
        if first_line == 1 and block.lstrip().startswith(b"[") and ".json" in map(str.lower, file.suffixes):
            yield _texts_of_array(file, block + b"".join(rest for _, rest in blocks), column)
            return
        try:
            yield _parse_lines(block, column)
        except pa.ArrowInvalid:
            yield _parse_line_by_line(file, first_line, block, column)


def _parse_lines(block: bytes, column: str) -> pa.Array:
    """The fast way: only the text is taken out of the objects, so that the rest of them may differ at will."""
    table = pyarrow.json.read_json(
        pa.BufferReader(block),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block)),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=pa.schema([(column, pa.large_string())]), unexpected_field_behavior="ignore"
        ),
    )
    table.validate(full=True)  # refuses what is not UTF-8
    if table[column].null_count:
        raise pa.ArrowInvalid("a line without text")
    return table[column].combine_chunks()


def _parse_line_by_line(file: Path, first_line: int, block: bytes, column: str) -> pa.Array:
    """The slow way, which knows the line that is wrong."""
    texts = []
    for number, line in enumerate(block.split(b"\n"), first_line):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                text = _decode(line, where)
                texts.append(_text_field(json.loads(text), where, column))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}, column {error.colno}: not valid JSON ({error.msg}); a .jsonl file holds one object a "
                    "line, and a .json file may also be one array of objects."
                ) from None
    return _string_array(texts)


def _texts_of_array(file: Path, content: bytes, column: str) -> pa.Array:
    try:
        records = json.loads(_decode(content, str(file)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); mend it, or write "
            "one object a line into a .jsonl file."
        ) from None
    return _string_array(
        [_text_field(record, f"{file}, record {number}", column) for number, record in enumerate(records, 1)]
    )


def _text_field(record: Any, where: str, column: str) -> str:
    text = record.get(column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        if not isinstance(record, dict):
            seen = f"a {type(record).__name__}"
        elif column in record:
            seen = f"{json.dumps(text)[:40]} there"
        else:
            seen = f"the fields {sorted(record)}"
        raise UserError(
            f'{where}: expected an object with the text as a string under "{column}", seen {seen}; name the '
            "field that holds the text in text_column, or mend the file."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{where}: the text under "{column}" has half a surrogate pair (\\ud800 to \\udfff), which is no '
            "character; write the file again with both halves."
        ) from None
    return text


def _parquet_texts(file: Path, column: str) -> Iterator[pa.Array]:
    with _readable(file), pyarrow.parquet.ParquetFile(file) as parquet:
        check_column(parquet.schema_arrow, column, str(file))
        row = 0
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=[column]):
            texts = batch.column(0).cast(pa.large_string())
            texts.validate(full=True)
            if texts.null_count:
                raise null_text(str(file), row + texts.is_null().index(True).as_py())
            yield texts
            row += len(texts)


def check_column(schema: pa.Schema, column: str, where: str) -> None:
    """Refuses a table whose `column` is missing or no text.

    Raises:
        UserError: with the columns that there are.
    """
    if column not in schema.names:
        question = did_you_mean(column, schema.names, "name the one that holds the text in text_column.")
        raise UserError(f'{where} has no column "{column}", but {schema.names}; {question}')
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        raise UserError(
            f'{where}: column "{column}" holds {kind}, not text; columns with text are {texts}, name one of '
            "them in text_column."
        )


def null_text(where: str, row: int) -> UserError:
    """The error for a row (counted from 0) whose text is null."""
    return UserError(
        f"{where}: row {row} (counted from 0) holds null instead of a text; drop such rows, or give them an "
        "empty text."
    )


def _lines(file: Path) -> Iterator[pa.Array]:
    for text in _text_blocks(file):
        yield _string_array(text.removesuffix("\n").split("\n"))


def _paragraphs(file: Path) -> Iterator[pa.Array]:
    """Texts between blank lines, which may hold white space."""
    paragraph: list[str] = []
    for text in _text_blocks(file):
        done = []
        for line in text.removesuffix("\n").split("\n"):
            if line and not line.isspace():
                paragraph.append(line)
            elif paragraph:
                done.append("\n".join(paragraph))
                paragraph = []
        yield _string_array(done)
    if paragraph:
        yield _string_array(["\n".join(paragraph)])


def _document(file: Path) -> Iterator[pa.Array]:
    yield _string_array(["".join(_text_blocks(file)).rstrip("\n")])


def _text_blocks(file: Path) -> Iterator[str]:
    """Whole lines of a text file, each ended by a line feed, however the file ends its lines."""
    for first_line, block in _line_blocks(file):
        text = _decode(block, str(file), first_line)
        yield text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _line_blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file that end where a line ends, each with the number of its first line, counted from 1."""
    pieces: list[bytes] = []
    number = 1
    with _readable(file), _open(file) as stream:
        start = stream.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while start:
            head, newline, tail = start.rpartition(b"\n")
            if newline:
                block = b"".join([*pieces, head, newline])
                yield number, block
                number += block.count(b"\n")
                pieces = []
            pieces.append(tail)
            start = stream.read(BLOCK_BYTES)
    if last := b"".join(pieces):
        yield number, last


def _decode(content: bytes, where: str, first_line: int | None = None) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if first_line is not None:
            line = first_line + content.count(b"\n", 0, error.start)
            where = f"{where}, line {line}"
        raise UserError(
            f"{where} is not UTF-8 text ({error.reason}, byte 0x{content[error.start]:02x}); convert the file "
            "to UTF-8."
        ) from None


def _string_array(texts: list[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def _open(file: Path) -> IO[bytes]:
    codec = COMPRESSIONS.get(file.suffix.lower())
    if codec is None:
        return file.open("rb")
    # Of the libraries at hand pyarrow alone reads every frame of a file of several and misses none that is cut off.
    return lzma.open(file) if codec == "xz" else pa.input_stream(str(file), compression=codec)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a UserError."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowInvalid) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read ({reason}); check the file, or copy it again.") from None
