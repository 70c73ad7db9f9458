"""Sources of text: from a path, or a name on the Hugging Face hub, to the documents of a split.

Everything goes through the `datasets` library, which converts text once into Arrow files in its cache and maps them
into memory, or streams it. What lies on this machine is read without any use of the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pyarrow as pa

from imdm_scale.assets import CORPUS
from imdm_scale.config.nearest import did_you_mean
from imdm_scale.data.detokenizers import DETOKENIZERS
from imdm_scale.data.source_corpus import (
    Corpus,
    explanation,
    in_words,
    open_files,
    open_saved,
    quiet_datasets,
)
from imdm_scale.data.source_files import FoundFiles, find_files, is_hub_copy, is_saved_dataset
from imdm_scale.data.source_hub import open_copy, open_hub
from imdm_scale.data.source_readers import Unit, check_column, null_text
from imdm_scale.data.source_splits import NONE, Role, Selection, hub_rule, local_rule, select
from imdm_scale.errors import UserError


@dataclass(frozen=True)
class SourceSpec:
    """Where text comes from, as it is asked for."""

    path: str | None = None
    """A local file or folder, else a name on the Hugging Face hub; None is the embedded corpus."""
    name: str | None = None
    """Configuration of a dataset of the hub, or of a local copy of its repository, such as wikitext-103-raw-v1."""
    text_column: str = "text"
    """Column or field that holds the text."""
    text_unit: Unit | None = None
    """What is one document of a text file; None takes the paragraph for one file, the document for a folder's."""
    streaming: bool = False
    """Whether to read the source as it comes, instead of converting it first into the cache of `datasets`."""
    detokenizer: str | None = None
    """Name in `DETOKENIZERS`, for corpora with spaces around punctuation."""
    train: str | None = None
    """Training text: a split or a part of it such as train[:-100000], or "none"; None is the corpus' own."""
    valid: str | None = None
    """Validation text, likewise."""


class Documents:
    """The documents of one split, read in order from anywhere."""

    num_documents: int | None
    """Documents in the split, blank ones too; None where a streamed source does not tell."""
    identity: str
    """Hexadecimal digest that changes whenever the documents may have changed."""

    def __init__(self, corpus: Corpus, selection: Selection, detokenizer: str | None):
        self._label = f"split {selection.name} of {corpus.label}"
        self._rows = corpus.rows[selection.name]
        self._streamed = corpus.streamed
        self._column = corpus.column
        self._start, self._stop = selection.start, selection.stop
        self._detokenize = DETOKENIZERS[detokenizer] if detokenizer is not None else None
        self._counted = corpus.counts[selection.name] is not None
        self.num_documents = self._stop - self._start if self._stop is not None and self._counted else None
        content = (corpus.identity, corpus.column, selection, detokenizer)
        self.identity = hashlib.sha256(repr(content).encode()).hexdigest()
        if self._rows.features is not None:
            check_column(self._rows.features.arrow_schema, self._column, self._label)

    def batches(self, start: int, size: int) -> Iterator[list[str]]:
        """Yields the documents from number `start` on, `size` at a time, the last time what is left.

        They are detokenised; blank ones stay in their places. A streamed source reads over what comes before `start`.

        Raises:
            UserError: a document is no text, or the source cannot be read on.
        """
        row = self._start + start
        for column in self._stream(row, size) if self._streamed else self._slices(row, size):
            texts = self._texts(column, row)
            row += len(texts)
            yield [self._detokenize(text) for text in texts] if self._detokenize else texts

    def _slices(self, row: int, size: int) -> Iterator[pa.ChunkedArray]:
        assert self._stop is not None
        rows = self._rows.select_columns([self._column]).with_format("arrow")
        for first in range(row, self._stop, size):
            yield rows[first : min(first + size, self._stop)][self._column]

    def _stream(self, row: int, size: int) -> Iterator[pa.ChunkedArray]:
        if self._stop is not None and row >= self._stop:
            return
        first = row
        try:
            for table in self._rows.skip(row).with_format("arrow").iter(size):
                check_column(table.schema, self._column, self._label)
                table = table.slice(0, None if self._stop is None else self._stop - row)
                row += len(table)
                yield table[self._column]
                if row == self._stop:
                    return
        except Exception as error:
            if explained := explanation(error):
                raise explained from None
            raise UserError(
                f"Reading {self._label} ended at document {row} ({in_words(error)}); check the network, then run the "
                "same command again."
            ) from error
        if self._counted and self._stop is not None:
            raise UserError(
                f"Reading {self._label} ended at document {row}, though {self._stop} were promised; do not stream it, "
                "or set train and valid to bounds counted from the start."
            )
        if row == first == self._start:
            raise UserError(f"There is no document {row} in {self._label}; choose another split or source.")

    def _texts(self, column: pa.ChunkedArray, row: int) -> list[str]:
        if column.null_count:
            raise null_text(self._label, row + column.to_pylist().index(None))
        try:
            return column.to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(
                f"A document of {self._label} from {row} to {row + len(column)} is not UTF-8 text ({error.reason}); "
                "convert the source to UTF-8."
            ) from None


def open_documents(spec: SourceSpec, split: Role) -> Documents | None:
    """The training or the validation documents of a source; None if it has none such.

    A source that is not streamed is converted into the cache of `datasets` the first time, which is one pass over it.

    Raises:
        UserError: the source does not exist, cannot be read or reached, or has no such column or split.
    """
    given: Mapping[Role, str | None] = {"train": spec.train, "valid": spec.valid}
    _check(spec)
    if given[split] == NONE:
        return None
    with quiet_datasets():
        corpus, rule = _open(spec)
        selection = select(split, given, rule, corpus.counts, corpus.label)
        return Documents(corpus, selection, spec.detokenizer) if selection else None


def _check(spec: SourceSpec) -> None:
    if spec.detokenizer is not None and spec.detokenizer not in DETOKENIZERS:
        question = did_you_mean(spec.detokenizer, DETOKENIZERS, "leave it out for plain text.")
        raise UserError(
            f"detokenizer is {spec.detokenizer!r}, but must be one of {', '.join(DETOKENIZERS)}; {question}"
        )
    if spec.text_unit is not None and spec.text_unit not in get_args(Unit):
        raise UserError(f"text_unit is {spec.text_unit!r}, but must be one of {', '.join(get_args(Unit))}.")


def _open(spec: SourceSpec) -> tuple[Corpus, Mapping[Role, str]]:
    """The source, and its own split expressions."""
    column, streaming = spec.text_column, spec.streaming
    if spec.path is None:
        found = FoundFiles("json", {split: (file,) for split, file in CORPUS.items()})
        return _open_local(spec, found, "paragraph", "the embedded corpus")
    path, label = Path(spec.path).expanduser(), f"the source {spec.path}"
    if not path.exists():
        corpus = open_hub(spec.path, spec.name, column, streaming, label)
        return corpus, hub_rule(spec.path, corpus.counts)
    if path.is_dir() and is_hub_copy(path):
        corpus = open_copy(path, spec.name, column, streaming, label)
        return corpus, hub_rule(path.absolute().name, corpus.counts)
    if path.is_dir() and is_saved_dataset(path):
        _refuse_without_meaning(spec, label, "table")
        corpus = open_saved(path, column, label)
        return corpus, local_rule(corpus.counts)
    return _open_local(spec, find_files(path), "document" if path.is_dir() else "paragraph", label)


def _open_local(
    spec: SourceSpec, found: FoundFiles, unit: Unit, label: str
) -> tuple[Corpus, Mapping[Role, str]]:
    _refuse_without_meaning(spec, label, found.kind)
    corpus = open_files(found, spec.text_column, spec.text_unit or unit, spec.streaming, label)
    return corpus, local_rule(corpus.counts)


def _refuse_without_meaning(spec: SourceSpec, label: str, kind: str) -> None:
    """Refuses settings that mean nothing for a local source of this kind."""
    if spec.name is not None:
        raise UserError(
            f"name is {spec.name!r}, but {label} has no configurations: only datasets of the hub have, and folders "
            "whose README.md lists them; leave name out."
        )
    if kind == "text" and spec.text_column != "text":
        raise UserError(
            f"text_column is {spec.text_column!r}, but {label} is plain text, without columns; leave it out."
        )
    if kind != "text" and spec.text_unit is not None:
        raise UserError(
            f"text_unit is {spec.text_unit!r}, but {label} is no plain text ({kind}); leave text_unit out."
        )
