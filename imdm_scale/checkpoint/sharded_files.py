"""Folders of safetensors in Hugging Face's layout: one file, or several with an index; read and written by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imdm_scale.errors import UserError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """The shapes of a folder's tensors by name, and the function that reads one of them.

    Only the files' headers are read here, and of the tensors only the one that is asked for.

    Raises:
        UserError: there is no safetensors file, one that the index names is missing or holds not what it should, or
            one is damaged.
    """
    promised = _index(folder)
    files = [ONE_FILE] if promised is None else sorted(set(promised.values()))
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for path in map(folder.joinpath, files):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if promised is None or promised.get(name) == path.name:
                        shapes[name] = tuple(file.get_slice(name).get_shape())
                        places[name] = path
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors ({error}); fetch the folder again."
            ) from None
    for name, file_name in (promised or {}).items():
        if name not in places:
            raise UserError(
                f"{folder / INDEX} says that {file_name} holds {name}, but it does not; fetch the folder again."
            )

    def tensor(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as file:
            return file.get_tensor(name)

    return shapes, tensor


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> name of its file; None for a folder of one file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / ONE_FILE).is_file():
            raise UserError(
                f"{folder} holds neither {ONE_FILE} nor {INDEX}; give a folder with a model's safetensors (other "
                "formats, which can run code, are not read)."
            )
        return None
    try:
        promised = {
            name: Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors ({error!r}); fetch the folder again.") from None
    for file_name in sorted(set(promised.values())):
        if not (folder / file_name).is_file():
            raise UserError(
                f"{folder} has no {file_name}, which {INDEX} names; fetch what is missing of the folder."
            )
    return promised


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], largest_file: int) -> None:
    """Write tensors as one file, or as several with an index; no more than one file's are held at a time.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) pairs.
        largest_file: bytes above which a file takes no further tensor.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / str(len(files)), metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > largest_file:
            flush()
        held[name] = tensor.detach().cpu().clone()  # a view of a larger tensor would be refused
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        names = [ONE_FILE]
    else:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, held in zip(names, files, strict=True) for name in held},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        (folder / str(i)).rename(folder / name)
        (folder / name).chmod(0o644)  # safetensors leaves it to its owner alone
