"""Checkpoints against their manifests, and which of a run's to take."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from imdm_scale.checkpoint.manifest import FileRecord, Manifest
from imdm_scale.config.model_folder import CHECKPOINTS, MANIFEST_FILE
from imdm_scale.errors import UserError


def name_of(step: int) -> str:
    """Name of the folder of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return FileRecord(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def damages(folder: Path, files: Iterable[tuple[str, FileRecord]], hashes: bool = True) -> Iterator[str]:
    """In words, how files of a checkpoint differ from what the manifest says of them.

    Args:
        hashes: whether their bytes are read, too, and not only their sizes.
    """
    for name, expected in files:
        path = folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected.num_bytes:
                yield f"{name} has {num_bytes} bytes, but the manifest says {expected.num_bytes}"
            elif hashes and record_of(path).sha256 != expected.sha256:
                yield f"{name} has been changed: its SHA-256 is not that in the manifest"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path names, newest first: itself, or those of a run's folder.

    Folders that were being written or removed have other names. Which one `latest` names does not matter: a run may
    have been killed between giving a checkpoint its name and saying so.
    """
    if (path / MANIFEST_FILE).is_file() or re.fullmatch(r"step-\d{8,}", path.name):
        return [path] if path.is_dir() else []
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not root.is_dir():
        return []
    found = [child for child in root.iterdir() if re.fullmatch(r"step-\d{8,}", child.name) and child.is_dir()]
    return sorted(found, key=lambda child: int(child.name.removeprefix("step-")), reverse=True)


def newest_whole(path: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest checkpoint that a path names and that verifies, with its manifest, and what was passed over and why.

    Raises:
        UserError: there is none.
    """
    passed_over: list[str] = []
    for folder in candidates(path):
        try:
            manifest = Manifest.read(folder)
            found = list(damages(folder, manifest.files.items()))
        except UserError as error:
            found = [str(error)]
        if not found:
            return folder, manifest, passed_over
        passed_over.append(f"{folder}: {'; '.join(found)}")
    raise none_whole(path, passed_over)


def none_whole(path: Path, passed_over: list[str]) -> UserError:
    """What to say where no checkpoint can be used."""
    if not passed_over:
        return UserError(
            f"{path} holds no checkpoint; give a run's folder, or a folder step-... of its {CHECKPOINTS}/."
        )
    return UserError(
        f"no checkpoint of {path} is whole ({' | '.join(passed_over)}); give another run's, or restore these files."
    )
