"""Reading the weights of a folder, from one safetensors file or from several with an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from imdm_scale.config.model_folder import INDEX_FILE, WEIGHTS_FILE
from imdm_scale.errors import UserError


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder, none of them read yet."""

    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    """Name -> shape, in the order of the files and of their tensors' names."""
    file_of: dict[str, Path]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in its stored type; KeyError if there is none of that name."""
        with safe_open(self.file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with their names, each file opened once."""
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
                    yield name, file.get_tensor(name)

    def sha256(self) -> str:
        """SHA-256 (hexadecimal) over the bytes of all files, one after the other."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                while content := stream.read(1 << 20):
                    digest.update(content)
        return digest.hexdigest()


def open_weights(folder: Path) -> WeightFiles:
    """The weights of `folder`: `model.safetensors`, else the files that `model.safetensors.index.json` names.

    Raises:
        UserError: there are none, or a file is missing, damaged or lacks a tensor of the index.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():
        return open_files(single)
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} cannot be read as an index of weights; export the model again.") from None
    if astray := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {astray[0]!r}, which is outside its folder; export the model again.")
    opened = open_files(*(folder / name for name in names))
    lost = [name for name, file in listed.items() if opened.file_of.get(name) != folder / file]
    if lost or len(listed) < len(opened.file_of):
        name = lost[0] if lost else next(name for name in opened.file_of if name not in listed)
        raise UserError(f"{index} and the files beside it disagree about {name}; export the model again.")
    return opened


def open_files(*paths: Path) -> WeightFiles:
    """The tensors of safetensors files.

    Raises:
        UserError: a file is missing or damaged, or two files hold tensors of one name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    file_of: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in shapes:
                        raise UserError(
                            f"{name} is in {path} and in {file_of[name]}; export the model again."
                        )
                    shapes[name] = tuple(file.get_slice(name).get_shape())
                    file_of[name] = path
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors ({error}); export the model again."
            ) from None
    return WeightFiles(tuple(paths), shapes, file_of)
