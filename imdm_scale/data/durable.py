"""Files that are whole and on the disk, or absent."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"
"""End of the name of a file or folder that is not whole yet; its name begins with a dot."""


def partial_path(path: Path) -> Path:
    """Where `path` is written before it takes its name."""
    return path.with_name(f".{path.name}{PARTIAL}")


def put_in_place(path: Path) -> None:
    """Gives what was written to `partial_path(path)` and flushed to the disk its name, durably."""
    os.replace(partial_path(path), path)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path`: at any moment, also after a loss of power, there is the old file or the new one."""
    partial = partial_path(path)
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    put_in_place(path)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
