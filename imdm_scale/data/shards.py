"""Shards: token blocks in files of NumPy's own format, which are memory-mapped.

Why this format: see benchmarks/shard_formats.py, which compares it with others.
"""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from imdm_scale.data.durable import partial_path, put_in_place
from imdm_scale.data.manifest import Shard

READ_BYTES = 1 << 20


def shard_dtype(vocab_size: int) -> str:
    """The narrowest stored type that holds the ids 0 to vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def map_shard(stream: BinaryIO, num_blocks: int, length: int, dtype: str) -> np.ndarray:
    """The blocks in an open file of NumPy's format 1.0, which is what np.save writes.

    Returns:
        A read-only memory map of type `dtype`, (num_blocks, length), which outlives the stream.

    Raises:
        ValueError: the file is something else.
    """
    expected = (num_blocks, length), False, np.dtype(dtype)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0) or np.lib.format.read_array_header_1_0(stream) != expected:
        raise ValueError(f"no array of {dtype} with {num_blocks} x {length} ids")
    blocks_BL = np.memmap(stream, expected[2], mode="r", offset=stream.tell(), shape=expected[0])
    return blocks_BL.view(np.ndarray)  # slices of a np.memmap are slower by its class' bookkeeping


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


class ShardWriter:
    """Writes the blocks of one split as shards 00000.npy, 00001.npy and so on.

    A shard takes its name when it is whole and on the disk. All shards of a split but the last have the same number of
    rows. So the header, which holds that number, is right from the start, and the bytes are hashed as they are written;
    only a last, shorter shard gets a new header at its end and is read once more for its hash.
    """

    def __init__(self, folder: Path, length: int, dtype: str, shard_bytes: int, first: int = 0) -> None:
        """A writer into the folder of a split, which is made if need be.

        Args:
            shard_bytes: no shard is larger, unless a single block is.
            first: number of the first shard; those before it are there already.

        Raises:
            OSError: the folder cannot be made.
        """
        self._folder, self._length, self._dtype = folder, length, np.dtype(dtype)
        row_bytes = length * self._dtype.itemsize
        self._max_rows = max(1, (shard_bytes - len(_header(1, length, self._dtype))) // row_bytes)
        self._number = first
        self._stream: BinaryIO | None = None
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, blocks_BL: np.ndarray) -> list[Shard]:
        """Appends blocks, and returns the shards that became whole with them.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        finished = []
        while len(blocks_BL):
            stream = self._stream or self._start()
            part_BL = blocks_BL[: self._max_rows - self._num_rows]
            data = np.ascontiguousarray(part_BL, dtype=self._dtype).view(np.uint8).data
            stream.write(data)
            self._digest.update(data)
            self._num_rows += len(part_BL)
            blocks_BL = blocks_BL[len(part_BL) :]
            if self._num_rows == self._max_rows:
                finished.append(self._finish())
        return finished

    def finish(self) -> list[Shard]:
        """Ends the split: blocks that fill no shard become its last, shorter one.

        Returns:
            That shard, or nothing where no such blocks are left.

        Raises:
            OSError: as `write`.
        """
        return [self._finish()] if self._stream else []

    def close(self) -> None:
        """Removes a shard that is not whole."""
        if self._stream:
            partial_path(self._path).unlink(missing_ok=True)
            with suppress(OSError):  # of a full disk, again, for what is still to be written
                self._stream.close()
            self._stream = None

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._number:05}.npy"

    def _start(self) -> BinaryIO:
        header = _header(self._max_rows, self._length, self._dtype)
        self._stream = partial_path(self._path).open("wb")
        self._stream.write(header)
        self._digest, self._num_rows = hashlib.sha256(header), 0
        return self._stream

    def _finish(self) -> Shard:
        stream, path = self._stream, self._path
        assert stream is not None
        sha256 = self._digest.hexdigest()
        if self._num_rows < self._max_rows:
            stream.seek(0)
            stream.write(_header(self._num_rows, self._length, self._dtype))
            stream.flush()
            sha256 = file_hash(partial_path(path))
        stream.flush()
        os.fsync(stream.fileno())
        num_bytes = stream.seek(0, os.SEEK_END)
        stream.close()
        self._stream = None
        put_in_place(path)
        self._number += 1
        return Shard(f"{path.parent.name}/{path.name}", self._num_rows, num_bytes, sha256)


def _header(num_rows: int, length: int, dtype: np.dtype) -> bytes:
    """The first bytes of a .npy file; as long for any number of rows, since NumPy leaves room for it to grow."""
    stream = io.BytesIO()
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (num_rows, length),
    }
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()
