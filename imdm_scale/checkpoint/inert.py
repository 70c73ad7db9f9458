"""Reading torch.save's files without running, importing or trusting anything that they name.

A pickle may name any function of any module and have it called. torch's own restricted unpickler (`weights_only`)
calls only what rebuilds tensors and plain containers, and refuses a file that names anything else: a Lightning
checkpoint, which holds omegaconf nodes and a tokenizer beside its weights. Here each such name stands for `Inert`,
which calls nothing: it only keeps what it was given, so that settings can still be read out of it as data.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from imdm_scale.errors import UserError

SYSTEM_MODULES = ("os", "posix", "nt", "sys")
"""Modules that only an attack would name; torch's unpickler refuses them, too."""


class Inert:
    """Stands for an instance of a class, or for the result of a function, that a file names."""

    arguments: tuple[Any, ...]
    """What it was made with."""
    state: Any
    """What it was given afterwards; None where nothing."""

    def __new__(cls, *arguments: Any) -> Inert:
        # Here and not in __init__, which a pickle need not call.
        instance = super().__new__(cls)
        instance.arguments = arguments
        instance.state = None
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PlainDict:
    """Stands for a kind of dictionary, such as a defaultdict, whose entries the unpickler puts into a plain one."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def load_inert(path: Path) -> Any:
    """What `torch.save` wrote to `path`, tensors mapped from the file, with every foreign object an `Inert`.

    Raises:
        UserError: it is no such file, or names something of `os` or `sys`.
    """
    try:
        if not zipfile.is_zipfile(
            path
        ):  # torch before 1.6 wrote these; they are read if they hold plain tensors
            return torch.load(path, map_location="cpu", weights_only=True)
        foreign = get_unsafe_globals_in_checkpoint(path)
        for name in foreign:
            if name.split(".")[0] in SYSTEM_MODULES:
                raise UserError(
                    f"{path} wants {name} to be called, which no checkpoint needs: nothing of it was run; do not use "
                    "this file, and get the checkpoint from its publisher."
                )
        stands_for = [(_PlainDict if name.lower().endswith("dict") else Inert, name) for name in foreign]
        with safe_globals(stands_for):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint of torch ({reason}); give a file that torch.save or Lightning "
            "wrote, or a .safetensors file."
        ) from None


def plain(value: Any) -> Any:
    """Containers and numbers out of what `load_inert` gave: omegaconf's nodes become what they hold.

    An omegaconf container keeps its nodes as `_content` and a node its value as `_val`. Other foreign objects become
    None.
    """
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:
            return plain(state["_content"])
        if "_val" in state:
            return plain(state["_val"])
        return None
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if isinstance(name, str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else None
