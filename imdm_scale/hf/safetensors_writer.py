"""A safetensors file written one tensor at a time, so that none but the present one need be in memory.

The format: the length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of every
tensor, padded with spaces so that the data are aligned to 8 bytes), then the tensors' bytes one after another
(github.com/huggingface/safetensors, README.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

NAMES = {
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
ALIGNMENT = 8
CHUNK = 1 << 24
"""Bytes that are hashed and written at a time."""


class SafetensorsWriter:
    """A context manager; on a regular exit the file is complete and on the disk.

    Args:
        path: where to; what stands there is overwritten.
        entries: name -> (dtype, shape), in the order in which the tensors will come.
        metadata: strings for readers.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.entries = dict(entries)
        self.pending = list(self.entries)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (dtype, shape) in self.entries.items():
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.num_bytes = 8 + len(text) + end
        """Size of the whole file."""
        self._hash = hashlib.sha256()
        self._stream = path.open("wb")
        self._put(len(text).to_bytes(8, "little") + text)

    @property
    def sha256(self) -> str:
        """Hash of what has been written."""
        return self._hash.hexdigest()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: another one is the next, or its dtype or shape is not as announced.
        """
        announced = self.entries[self.pending[0]] if self.pending else None
        if announced is None or name != self.pending[0]:
            raise ValueError(f"{name} comes where {self.pending[:1] or 'the end'} was announced")
        if (tensor.dtype, tuple(tensor.shape)) != (announced[0], tuple(announced[1])):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced were {announced}")
        self.pending.pop(0)
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for first in range(0, len(data), CHUNK):
            self._put(data[first : first + CHUNK])

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._stream.write(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                if self.pending:
                    raise ValueError(f"{len(self.pending)} tensors were announced and did not come")
                self._stream.flush()
                os.fsync(self._stream.fileno())
