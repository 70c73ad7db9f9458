"""One rank's shard of a checkpoint: a safetensors file that is on the disk and reads back as it was written."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from imdm_scale.checkpoint.manifest import FileRecord
from imdm_scale.checkpoint.verify import record_of
from imdm_scale.hf.safetensors_writer import SafetensorsWriter, TensorEntry


def write_shard_file(path: Path, tensors: dict[str, dict[str, Tensor]]) -> FileRecord:
    """Write, flush, read again and compare.

    Args:
        tensors: kind -> name -> elements; stored under `KIND/NAME`.

    Raises:
        OSError: the disk refuses, or gives back something else.
    """
    flat = {f"{kind}/{name}": x for kind, named in tensors.items() for name, x in named.items()}
    entries = [TensorEntry(key, x.dtype, tuple(x.shape)) for key, x in flat.items()]
    with SafetensorsWriter(path, entries) as writer:
        for key, x in flat.items():
            writer.write(key, x)
    return check_reads_back(path, writer)


def check_reads_back(path: Path, writer: SafetensorsWriter) -> FileRecord:
    """Size and hash of a file that has been written and is found so on the disk.

    Raises:
        OSError: the disk gives back something else.
    """
    written = FileRecord(writer.num_bytes, writer.sha256)
    with path.open("rb") as stream:
        # So that the disk is read, and not what the kernel still has of the writing.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if record_of(path) != written:
        raise OSError(f"{path} does not read back as it was written")
    return written
