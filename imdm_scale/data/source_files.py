"""What lies at a local path: files of text of one kind, a folder of save_to_disk, or a copy of a hub repository."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imdm_scale.data.source_readers import SUFFIXES, Kind, kind_of
from imdm_scale.errors import UserError

READER_VERSION = 1
"""Raised whenever the same files would be read as other texts, so that nothing old is taken from a cache."""

SPLIT_IN_NAME = re.compile(r"(?:^|[-._])(train|validation|valid|val|dev|test)\d*(?=[-._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class FoundFiles:
    """The files of a corpus, of one kind."""

    kind: Kind
    splits: dict[str, tuple[Path, ...]]
    """By name, each in order."""


def find_files(path: Path) -> FoundFiles:
    """The files of text at a path that exists, those of a folder sorted by name.

    A folder's files are one split, "train". Only where the names of its files, or of its folders, tell a train
    split from another, such as train-00000.parquet and test.parquet or train/a.txt and valid/b.txt, do they make
    splits of these names: otherwise validation text would be trained on.

    Raises:
        UserError: there is no file of a known kind, there are several kinds, or only some names tell a split.
    """
    if not path.is_dir():
        kind = kind_of(path)
        if kind is None:
            raise UserError(f"The source {path} is not of a known format; known are {', '.join(SUFFIXES)}.")
        return FoundFiles(kind, {"train": (path,)})
    files = [file for file in files_below(path) if kind_of(file) is not None]
    kinds = Counter(kind for file in files if (kind := kind_of(file)))
    if not kinds:
        raise UserError(
            f"The source {path} is a folder without files of a known format; known are {', '.join(SUFFIXES)}."
        )
    if len(kinds) > 1:
        seen = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        raise UserError(
            f"The source {path} holds files of several kinds ({seen}), and it is not clear in which order they "
            "belong; give each kind a folder of its own."
        )
    return FoundFiles(next(iter(kinds)), _splits(path, files))


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and the folders in it, but hidden ones, sorted by their path.

    Raises:
        UserError: one is a link to a file that is not there.
    """
    relative = sorted(file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir())
    files = [folder / file for file in relative if not any(part.startswith(".") for part in file.parts)]
    for file in files:
        if not file.exists():
            raise UserError(
                f"{file} is a link to {file.readlink()}, which is not there; copy that file, too."
            )
    return files


def identity_of(files: Iterable[Path], *settings: object) -> str:
    """A digest of the files' paths, sizes and times of change, and of settings: of all that decides what is read."""
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([READER_VERSION, stats, settings]).encode()).hexdigest()


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by save_to_disk of `datasets`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def is_hub_copy(path: Path) -> bool:
    """Whether a folder is a copy of a dataset's repository whose README.md says which files are which split."""
    readme = path / "README.md"
    if not readme.is_file():
        return False

    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return "configs" in (metadata_load(readme) or {})
    except (OSError, ValueError, YAMLError):  # a README.md of another kind
        return False


def _splits(folder: Path, files: list[Path]) -> dict[str, tuple[Path, ...]]:
    names = {file: _split_in_name(file.relative_to(folder)) for file in files}
    told = {name for name in names.values() if name}
    if "train" not in told or len(told) == 1:
        return {"train": tuple(files)}
    if silent := [file for file, name in names.items() if name is None]:
        raise UserError(
            f"The source {folder} has files whose names tell their split ({', '.join(sorted(told))}), but "
            f"{silent[0].relative_to(folder)} does not; rename it, or give the splits folders of their own."
        )
    return {name: tuple(file for file in files if names[file] == name) for name in sorted(told)}


def _split_in_name(file: Path) -> str | None:
    for part in (file.parts[0], file.name):
        if match := SPLIT_IN_NAME.search(part):
            return match[1].lower()
    return None
