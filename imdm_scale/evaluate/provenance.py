"""What it takes to make a figure again: command, commit, versions, machine."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("imdm_scale", "torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "numpy")


def provenance(argv: Sequence[str], num_processes: int, device: str) -> dict[str, Any]:
    """A record of this invocation, ready for JSON.

    Args:
        argv: the words of the command, the program first.
        num_processes: over all machines; more than one were started by a launcher.
        device: what computes, in words.
    """
    launcher = ["deepspeed", "--num_gpus", str(num_processes)] if num_processes > 1 else ["python"]
    words = [word for word in argv if not word.startswith("--local_rank")]
    return {
        "command": shlex.join([*launcher, *words]),
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
        "processes": num_processes,
        "device": device,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """Python's version and that of each package that decides about figures; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def commit(folder: Path) -> str | None:
    """The commit of the checkout that `folder` lies in, with `-dirty` where files differ from it; None outside any."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
