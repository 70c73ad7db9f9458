"""The files of an exported model, by name, as transformers knows them. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Which tensor is in which file, where the weights are more than one."""
CHECKPOINTS, STUDENT = "checkpoints", "student"
"""Of a run's folder: where its checkpoints are, and its exported student."""
MANIFEST_FILE = "manifest.json"
"""Of a checkpoint: what it says of itself."""
LATEST = "latest"
"""Of the folder of checkpoints: the file that names the one finished last. As `resume`: the newest whole one of
run_dir."""


def missing_files(folder: Path) -> list[str]:
    """Names of the files that `folder` lacks to be a model: config.json, and weights in one file or in several."""
    missing = [] if (folder / CONFIG_FILE).is_file() else [CONFIG_FILE]
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        missing.append(WEIGHTS_FILE)
    return missing


def is_hub_name(name: str) -> bool:
    """Whether a name can be one on the Hugging Face hub, OWNER/NAME, and is no misspelt local path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def may_hold_model(folder: Path) -> bool:
    """Whether a folder holds a model: an exported one, a checkpoint, or a run with either."""
    is_run = (folder / CHECKPOINTS).is_dir() or not missing_files(folder / STUDENT)
    return not missing_files(folder) or is_run or (folder / MANIFEST_FILE).is_file()
