"""Writing a safetensors file tensor by tensor, so that no more than one of them need be in memory.

The format (safetensors' README): the length of the header as 8 little-endian bytes; the header, JSON, which gives
each tensor's type, shape and place among the data, filled up with spaces to a multiple of 8 bytes; the data, without
gaps. Names, types and shapes are known beforehand, so the header is written first and the bytes follow as they come.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
METADATA = {"format": "pt"}
"""Says that the tensors are torch's; transformers asks for it."""
ALIGNMENT = 8
BUFFER_ELEMENTS = 1 << 22
"""Elements that are converted and written at a time."""


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor, but for its place."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A file that is written in the order of its header; a context manager.

    `sha256` (hexadecimal) and `num_bytes` are those of the whole file once it is closed, when its bytes are on the
    disk. Where the context ends by an error the file is closed as it is: not a whole one.

    Args:
        path: of the file, which is replaced.
        entries: every tensor, in the order in which `write` will be called.

    Raises:
        OSError: the disk refuses; from every method.
        ValueError: two tensors have one name, or one would begin where its type cannot (wider types go first).
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        header = _header(entries)
        self.sha256 = ""
        self.num_bytes = 0
        self._pending = list(entries)
        self._hash = hashlib.sha256()
        self._file = path.open("wb")
        self._put(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, from any device, converted to its entry's type.

        Raises:
            ValueError: it is not the next one by name or shape.
        """
        expected = self._pending[0] if self._pending else None
        if expected is None or (name, tuple(tensor.shape)) != (expected.name, expected.shape):
            wanted = f"{expected.name} {expected.shape}" if expected else "the end of the file"
            raise ValueError(f"{name} {tuple(tensor.shape)} comes where {wanted} is due")
        del self._pending[0]
        for part in tensor.detach().reshape(-1).split(BUFFER_ELEMENTS):
            stored = part.to(device="cpu", dtype=expected.dtype).contiguous()
            self._put(memoryview(stored.view(torch.uint8).numpy()))

    def close(self) -> None:
        """Waits until the bytes are on the disk, and fills in `sha256`.

        Raises:
            ValueError: a tensor is missing.
        """
        if self._pending:
            raise ValueError(
                f"{len(self._pending)} tensors are missing, the first is {self._pending[0].name}"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.sha256 = self._hash.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._file.close()

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.num_bytes += len(content)


def _header(entries: Sequence[TensorEntry]) -> bytes:
    described: dict[str, object] = {"__metadata__": METADATA}
    begin = 0
    for entry in entries:
        if entry.name in described:
            raise ValueError(f"two tensors have the name {entry.name}")
        if begin % entry.dtype.itemsize:
            raise ValueError(f"{entry.name} would begin at byte {begin}, where its type cannot")
        end = begin + entry.num_bytes
        described[entry.name] = {
            "dtype": TYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header = json.dumps(described, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % ALIGNMENT)
