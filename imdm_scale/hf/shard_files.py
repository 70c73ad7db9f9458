"""Weights in one file or in several: how they are divided, written and listed.

As transformers does it: up to `max_shard_size` bytes of tensors go into `model.safetensors`; more are dealt, in their
order, to `model-00001-of-0000N.safetensors` and so on, and `model.safetensors.index.json` says which tensor is where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from imdm_scale.config.model_folder import INDEX_FILE, WEIGHTS_FILE
from imdm_scale.errors import UserError

from .safetensors_writer import SafetensorsWriter, TensorEntry

MAX_SHARD_SIZE = "5GB"
"""Bytes of a file, by default."""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""As transformers counts them."""


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000, "5GB" or "200 MB".

    Raises:
        UserError: it is no such size, or is not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    parsed = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if parsed < 1:
        raise UserError(
            f"max_shard_size is {size!r}, which is no size of a file; give a number of bytes, or one with KB, MB, GB "
            "or TB, such as 5GB."
        )
    return parsed


def plan_shards(entries: Sequence[TensorEntry], max_bytes: int) -> dict[str, list[TensorEntry]]:
    """File name -> its tensors; a tensor above `max_bytes` gets a file of its own."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    stem = Path(WEIGHTS_FILE).stem
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], entries: Sequence[TensorEntry], max_bytes: int
) -> dict[str, str]:
    """Writes the weights' files into `folder`, one tensor at a time.

    Args:
        tensors: in the order of `entries`, and no others.
        max_bytes: of a file's tensors.

    Returns:
        File name -> SHA-256 (hexadecimal).

    Raises:
        OSError: the disk refuses.
        ValueError: the tensors are not those of `entries`.
    """
    stream = iter(tensors)
    shards = plan_shards(entries, max_bytes)
    hashes = {}
    for file_name, shard in shards.items():
        with SafetensorsWriter(folder / file_name, shard) as writer:
            for _ in shard:
                pair = next(stream, None)
                if pair is None:
                    break  # closing the file says what is missing
                writer.write(*pair)
                del pair  # the next tensor is made when this one's memory is free
        hashes[file_name] = writer.sha256
    surplus = next(stream, None)
    if surplus is not None:
        raise ValueError(f"{surplus[0]} has no place among the weights")
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(prod(entry.shape) for entry in entries),
                "total_size": sum(entry.num_bytes for entry in entries),
            },
            "weight_map": {entry.name: file_name for file_name, shard in shards.items() for entry in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes
