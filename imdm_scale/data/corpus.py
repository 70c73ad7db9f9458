"""Corpora: from a path to the text of its documents.

A corpus is the embedded one, a file, or a folder of files. A `.jsonl` file holds one object a line with the
document under "text"; a `.txt` file that is the whole corpus holds documents separated by blank lines, and
in a folder each `.txt` file is one document. All of them may be compressed (`.gz`, `.xz`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from imdm_scale.assets import CORPUS
from imdm_scale.errors import UserError

Split = Literal["train", "valid"]

FORMATS = (".jsonl", ".txt")
COMPRESSIONS: dict[str, Callable[..., IO[str]]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = tuple(suffix + compression for suffix in FORMATS for compression in COMPRESSIONS)


def read_documents(path: Path | None, split: Split) -> Iterator[str]:
    """Yields the documents of one split of a corpus, in order and without empty ones.

    The embedded corpus (`path` None) comes with its validation documents. Of any other corpus the last 1% of
    the documents, at least one, are the validation split. One pass, with a hundredth of the corpus in memory.

    Raises:
        UserError: no such file, a file that cannot be read as its name says, a line without a text, or a
            corpus with too few documents for the split.
    """
    if path is None:
        yield from _documents_of_file(CORPUS[split])
        return
    held_out: deque[str] = deque()
    number = 0
    for document in _all_documents(path):
        held_out.append(document)
        number += 1
        if len(held_out) > max(1, number // 100):
            document = held_out.popleft()
            if split == "train":
                yield document
    if number < 2:
        raise UserError(
            f"data.path {path} holds {number} document(s) with text, and at least 2 are needed, one of them "
            "for validation; add documents, or separate those of a text file by blank lines."
        )
    if split == "valid":
        yield from held_out


def corpus_hash(path: Path | None, split: Split) -> str:
    """SHA-256 (hexadecimal) over the names and bytes of the files that `read_documents(path, split)` reads.

    Raises:
        UserError: as `read_documents` for paths.
    """
    digest = hashlib.sha256()
    for file in [CORPUS[split]] if path is None else corpus_files(path):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def corpus_files(path: Path) -> list[Path]:
    """The files of the corpus at `path`, sorted by name.

    Raises:
        UserError: there is no such path, or it is no file and no folder with files of a known format.
    """
    if not path.exists():
        raise UserError(f"data.path {path} does not exist; give a file ({', '.join(SUFFIXES)}) or a folder.")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        kind = "is a folder without files" if path.is_dir() else "is not"
        raise UserError(f"data.path {path} {kind} of a known format; known are {', '.join(SUFFIXES)}.")
    return files


def _all_documents(path: Path) -> Iterator[str]:
    for file in corpus_files(path):
        documents = _documents_of_file(file)
        if path.is_dir() and not _is_jsonl(file):
            documents = iter(["\n\n".join(documents)])
        yield from filter(str.strip, documents)


def _is_jsonl(file: Path) -> bool:
    return file.name.endswith(tuple(".jsonl" + compression for compression in COMPRESSIONS))


def _documents_of_file(file: Path) -> Iterator[str]:
    """Documents of a `.jsonl` file, or the parts of a `.txt` file between blank lines."""
    with _open_text(file) as lines:
        if _is_jsonl(file):
            for number, line in enumerate(lines, 1):
                yield _text_field(line, file, number)
            return
        paragraph: list[str] = []
        for line in lines:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph).rstrip("\n")
                paragraph = []
        if paragraph:
            yield "".join(paragraph).rstrip("\n")


def _text_field(line: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {number}, column {error.colno}: not valid JSON ({error.msg}); "
            "a .jsonl file holds one object a line."
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        seen = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(
            f'{file}, line {number}: expected an object with the document\'s text as a string under "text", '
            f"seen {seen}; rename the field that holds the text."
        )
    return record["text"]


@contextmanager
def _open_text(file: Path) -> Iterator[IO[str]]:
    """Opens a file as UTF-8 text; what goes wrong while it is read becomes a UserError."""
    opener = COMPRESSIONS[file.suffix if file.suffix in COMPRESSIONS else ""]
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read ({reason}); check the file, or copy it again.") from None
