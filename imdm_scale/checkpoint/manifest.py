"""What a checkpoint says of itself: manifest.json, written last, with the size and hash of every other file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.model_folder import MANIFEST_FILE
from imdm_scale.data.durable import write_whole
from imdm_scale.errors import UserError

FORMAT = 1
MASTER, AVERAGE = "master", "ema"
"""Kinds of tensors that say what the network is; the others are the optimizer's."""


class DamagedCheckpoint(UserError):
    """A folder that is no whole checkpoint."""


class FileRecord(NamedTuple):
    """What a file must be."""

    num_bytes: int
    sha256: str


class StoredPiece(NamedTuple):
    """A run of elements of one tensor in a shard file, where each kind has it under `KIND/NAME`."""

    name: str
    """The tensor's canonical name."""
    tp: int
    """Number of the tensor-parallel shard; 0 where the tensor is not cut."""
    start: int
    """The first element in the flattened shard."""
    size: int
    """Elements."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint, all but the numbers."""

    step: int
    """Updates done."""
    kinds: tuple[str, ...]
    """What there is of every piece: master weights, and of a run their average and AdamW's running means."""
    architecture: dict[str, Any]
    """Fields of `Architecture`."""
    layout: dict[str, Any]
    """How the network was spread when it was saved; `tp` is what the cut of the tensors depends on."""
    progress: dict[str, Any]
    """The run's counters; empty where it is no run's."""
    data: dict[str, Any] | None
    """The place in the data (`data.place.Place`)."""
    teacher: dict[str, Any] | None
    """The teacher: path and hash of a folder, or the name of a subfolder with the weights of a past student."""
    config: dict[str, Any]
    """All settings of the run."""
    deepspeed: dict[str, Any]
    """Its DeepSpeed configuration."""
    made_by: dict[str, Any]
    """Versions, commit and command."""
    pieces: dict[str, list[StoredPiece]]
    """Shard file -> what is in it."""
    files: dict[str, FileRecord]
    """Every file beside the manifest, by its path in the folder."""

    @property
    def tp(self) -> int:
        """Tensor-parallel size of the shards."""
        return int(self.layout["tp"])

    @property
    def num_bytes(self) -> int:
        """Size of all files that it lists."""
        return sum(record.num_bytes for record in self.files.values())

    def network(self) -> Architecture:
        """The network."""
        return Architecture(**self.architecture)

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, whole and on the disk."""
        text = _canonical(asdict(self))
        record = {"format": FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        write_whole(folder / MANIFEST_FILE, f'{json.dumps(record)[:-1]}, "manifest": {text}}}\n')

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            DamagedCheckpoint: there is none, or it is not as it was written.
        """
        path = folder / MANIFEST_FILE
        try:
            whole = json.loads(path.read_bytes())
            fields = whole["manifest"]
            if whole["format"] != FORMAT:
                raise DamagedCheckpoint(
                    f"{path} has format {whole['format']}, but this version reads {FORMAT}"
                )
            if hashlib.sha256(_canonical(fields).encode()).hexdigest() != whole["sha256"]:
                raise DamagedCheckpoint(f"{path} is not as it was written: its hash is another")
            return cls(
                **{
                    **fields,
                    "kinds": tuple(fields["kinds"]),
                    "pieces": {
                        file: [StoredPiece(*piece) for piece in pieces]
                        for file, pieces in fields["pieces"].items()
                    },
                    "files": {name: FileRecord(*record) for name, record in fields["files"].items()},
                }
            )
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedCheckpoint(f"{path} is damaged ({error})") from None


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))
