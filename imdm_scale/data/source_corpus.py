"""An opened source, and how local files and folders of save_to_disk are opened through `datasets`."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imdm_scale.data.source_files import FoundFiles, files_below, identity_of
from imdm_scale.data.source_readers import Unit, count_parquet_rows
from imdm_scale.errors import UserError

DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


@dataclass(frozen=True)
class Corpus:
    """An opened source."""

    label: str
    """The source, for messages."""
    rows: Mapping[str, Any]
    """By split that is not empty: `datasets.Dataset`, or `datasets.IterableDataset` if it is streamed."""
    counts: Mapping[str, int | None]
    """Documents of every split, None where it does not tell."""
    column: str
    """The column with the text."""
    streamed: bool
    identity: str
    """Digest of what the rows come from."""


def open_files(found: FoundFiles, column: str, unit: Unit, streaming: bool, label: str) -> Corpus:
    """Files of one kind.

    Args:
        column: the field or column of the files that holds the text.
        unit: what is one document of a text file.

    Raises:
        UserError: a file cannot be read, or the cache cannot be written.
    """
    from imdm_scale.data.source_builder import COLUMN, TextFiles

    files = [file for files in found.splits.values() for file in files]
    identity = identity_of(files, {split: len(files) for split, files in found.splits.items()}, column, unit)
    with explained_errors():
        builder = TextFiles(
            dataset_name="imdm_scale_text",
            config_id=identity[:32],  # names the folder in the cache
            files=found.splits,
            kind=found.kind,
            column=column,
            unit=unit,
        )
        rows, counts = build(builder, streaming)
    if (
        streaming
    ):  # not what an earlier conversion left in the cache: a stream is the same with it and without
        parquet = found.kind == "parquet"
        counts = {
            split: sum(map(count_parquet_rows, files)) if parquet else None
            for split, files in found.splits.items()
        }
    return Corpus(label, rows, counts, COLUMN, streaming, identity)


def open_saved(path: Path, column: str, label: str) -> Corpus:
    """A folder that save_to_disk wrote; it is Arrow already, so that it is never converted.

    Raises:
        UserError: its files cannot be read.
    """
    import datasets

    files = [file for file in files_below(path) if not file.name.startswith("cache-")]  # those of Dataset.map
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(
            f"The folder {path} says that save_to_disk wrote it, but cannot be loaded ({in_words(error)}); copy it "
            "again."
        ) from error
    rows = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    counts = {split: len(dataset) for split, dataset in rows.items()}
    return Corpus(label, rows, counts, column, False, identity_of(files))


def build(builder: Any, streaming: bool) -> tuple[dict[str, Any], dict[str, int | None]]:
    """The rows of a `datasets.DatasetBuilder` by split, converted into the cache or streamed, and their number.

    A split without rows has a number alone; of a stream the number is known if the builder's information has it.
    """
    if not streaming:
        builder.download_and_prepare()
    counts = {name: info.num_examples for name, info in (builder.info.splits or {}).items()}
    if not streaming:
        return {name: builder.as_dataset(split=name) for name, count in counts.items() if count}, counts
    streams = dict(builder.as_streaming_dataset())
    return streams, {name: counts.get(name) or None for name in streams}


@contextmanager
def explained_errors() -> Iterator[None]:
    """Shows what `datasets` wraps: a UserError of the readers, or a cache that cannot be written."""
    try:
        yield
    except Exception as error:
        if explained := explanation(error):
            raise explained from None
        raise


def explanation(error: BaseException) -> UserError | None:
    """The UserError among the causes of an error, or one that says that the cache cannot be written."""
    import datasets

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, OSError) and (cause.errno in DISK_ERRORS or "disk space" in str(cause)):
            return UserError(
                f"The cache of datasets, {datasets.config.HF_DATASETS_CACHE}, cannot be written "
                f"({cause}); make room there, or set the environment variable HF_HOME to another "
                "folder."
            )
        cause = cause.__cause__ or cause.__context__
    return None


def in_words(error: BaseException) -> str:
    """Kind and first words of a library's error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars and log of `datasets`: its user has a bar of its own, and errors are raised."""
    import datasets

    bars = not datasets.utils.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
