"""The folder of a preparation: whose it is, what is in it, and what may be written there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import filelock

from imdm_scale.data.durable import partial_path
from imdm_scale.data.manifest import FILE_NAME, Manifest
from imdm_scale.errors import UserError

SPLITS: tuple[Literal["train"], Literal["valid"]] = ("train", "valid")
"""The splits of a corpus, each of which has a folder of that name."""
PROGRESS_FILE = "progress.json"
"""Makes a folder that of an unfinished preparation; see resuming.py."""
LOCK_FILE = ".lock"


def finished_manifest(out: Path, plan: Manifest) -> Manifest | None:
    """The manifest in `out`, if there is one.

    Args:
        plan: the manifest that is wanted, without splits.

    Raises:
        UserError: it is that of other data, or is none.
    """
    try:
        text = (out / FILE_NAME).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{out / FILE_NAME} cannot be read ({error.strerror}); choose another folder."
        ) from None
    manifest = Manifest.from_json(text, str(out))
    refuse_other_choices(out, manifest, plan)
    with suppress(OSError):  # the folder may belong to somebody else, who also leaves these behind
        tidy(out)
    return manifest


def refuse_other_choices(out: Path, there: Manifest, plan: Manifest) -> None:
    """Raises UserError if `there` differs from `plan` in anything but the splits, and names the first difference."""
    old, new = (_choices(dataclasses.asdict(manifest)) for manifest in (there, plan))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise UserError(
                f"{out} holds data prepared with {name} {_shown(old.get(name))}, but {name} is now "
                f"{_shown(new.get(name))}; choose another folder, delete this one, or ask for the same again."
            )


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Makes `out` and holds its lock, which ends with this process at the latest.

    Raises:
        UserError: another process holds it, or `out` cannot be made, or holds files that are not of a preparation.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_files(out)
        lock = filelock.FileLock(out / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{out} is being prepared by another process; wait for its end, or choose another folder."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes a UserError of what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}); mend that, or choose another folder; what is "
            "finished is kept, and the same command goes on from there."
        ) from None


def tidy(out: Path) -> None:
    """Removes what only an unfinished preparation needs.

    Raises:
        OSError: it cannot be removed.
    """
    for name in (PROGRESS_FILE, LOCK_FILE):
        (out / name).unlink(missing_ok=True)


def _refuse_foreign_files(out: Path) -> None:
    own = {LOCK_FILE, partial_path(out / PROGRESS_FILE).name}
    names = sorted(entry.name for entry in out.iterdir() if entry.name not in own)
    if names and not {PROGRESS_FILE, FILE_NAME} & set(names):
        more = ", ..." if len(names) > 3 else ""
        raise UserError(
            f"{out} holds files that no preparation left there ({', '.join(names[:3])}{more}); choose an empty or a "
            "new folder."
        )


def _choices(manifest: dict[str, Any]) -> dict[str, Any]:
    """The innermost entries of a manifest without its splits, the more telling ones first."""
    order = ("source", "options", "length", "shuffle_window", "tokenizer", "dtype", "format")
    nested = {key: manifest[key] for key in order}
    return {
        inner if key in ("options", inner) else f"{key}.{inner}": value
        for key, part in nested.items()
        for inner, value in (part.items() if isinstance(part, dict) else [(key, part)])
    }


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
