"""Writing checkpoints while training goes on: beside, verified, renamed; `latest` moves last.

Every rank writes its own shard in a thread and says so in the rendezvous store; the first rank's thread then writes
the manifest and gives the folder its name. Until then the folder's name begins with a dot and nobody reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from imdm_scale.checkpoint.manifest import FileRecord, Manifest, StoredPiece
from imdm_scale.checkpoint.shard_file import write_shard_file
from imdm_scale.checkpoint.verify import candidates, name_of, record_of
from imdm_scale.config.model_folder import LATEST
from imdm_scale.data.durable import PARTIAL, partial_path, sync, write_whole
from imdm_scale.errors import UserError
from imdm_scale.parallel.compat import default_store

FOREVER = timedelta(days=365)
"""A rank that is gone ends all others; one whose disk is slow is waited for."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep_last: int
    """The newest so many."""
    keep_every: int
    """Beside them those whose number of updates is a multiple of this; 0 is none."""

    def dispensable(self, steps: list[int]) -> list[int]:
        """Those of the given steps that may go."""
        newest = sorted(steps)[-self.keep_last :]
        return [
            step
            for step in steps
            if step not in newest and not (self.keep_every and step % self.keep_every == 0)
        ]


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to write: copies that training does not touch."""

    pieces: list[StoredPiece]
    tensors: dict[str, dict[str, Tensor]]
    """Kind -> name -> elements, 1-D float32 on the CPU."""


class CheckpointWriter:
    """One rank's part in a run's checkpoints.

    Args:
        root: the run's folder of checkpoints, on a file system that all ranks see.
        ranks: global ranks that write, in order; the first gives the folder its name.
        group: these ranks.
        retention: which ones stay.
    """

    def __init__(
        self, root: Path, ranks: tuple[int, ...], group: dist.ProcessGroup, retention: Retention
    ) -> None:
        self.root, self.ranks, self.group, self.retention = root, ranks, group, retention
        self.index = ranks.index(dist.get_rank())
        # A connection of its own: a wait would block the thread that watches for failures.
        self.store = default_store().clone()
        self.thread: threading.Thread | None = None
        self.failure: tuple[int, BaseException] | None = None
        self.last_step: int | None = None

    def save(
        self,
        step: int,
        snapshot: Snapshot,
        manifest: Callable[[], Manifest],
        add_files: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Begin to write; returns when the copies are in the thread's hands. Collective over the ranks.

        Args:
            manifest: makes it, without `pieces` and `files`; called in the first rank's thread.
            add_files: puts further files into the folder; called there, too.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        partial = partial_path(self.root / name_of(step))
        if self.index == 0:
            self._make_partial(partial)
        # Nobody writes before the folder is there, or while the checkpoint before is unfinished.
        dist.barrier(self.group)
        self.last_step = step

        def write() -> None:
            try:
                self._write(step, partial, snapshot, manifest, add_files)
            except BaseException as error:  # told by the main thread
                self.failure = (step, error)
                if self.index == 0:
                    shutil.rmtree(partial, ignore_errors=True)

        self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()

    def poll(self) -> None:
        """Say it if the last checkpoint could not be written.

        Raises:
            UserError: so it is.
        """
        if self.failure is not None:
            step, error = self.failure
            self.failure = None
            raise UserError(
                f"the checkpoint after update {step} could not be written to {self.root} ({error}); what was saved "
                "before it is whole: free space or correct the permissions, and go on with resume=latest."
            ) from error

    def wait(self) -> None:
        """Return when this rank's part in the last checkpoint is done; on the first rank, the whole checkpoint.

        Raises:
            UserError: it could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.poll()

    def _make_partial(self, partial: Path) -> None:
        try:
            remove_unfinished(self.root)
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{partial} could not be made ({error.strerror}); what was saved before is whole: free space or "
                "correct the permissions, and go on with resume=latest."
            ) from error

    def _write(
        self,
        step: int,
        partial: Path,
        snapshot: Snapshot,
        manifest: Callable[[], Manifest],
        add_files: Callable[[Path], None],
    ) -> None:
        name = f"student-{self.index:05d}.safetensors"
        try:
            record = write_shard_file(partial / name, snapshot.tensors)
        except BaseException:
            self.store.set(self._key(step, self.index), "")
            raise
        if self.index > 0:
            told = json.dumps([name, record, snapshot.pieces])
            self.store.set(self._key(step, self.index), told)
            return
        add_files(partial)
        files = {
            str(path.relative_to(partial)): record_of(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file() and not path.name.startswith("student-")
        }
        for path in files:
            sync(partial / path)
        pieces = {name: snapshot.pieces}
        files[name] = record
        for index in range(1, len(self.ranks)):
            name, record, its_pieces = self._told_by(step, index)
            files[name], pieces[name] = record, its_pieces
        replace(manifest(), pieces=pieces, files=files).write(partial)
        self._put_in_place(partial, self.root / name_of(step))
        write_whole(self.root / LATEST, name_of(step) + "\n")
        self._remove_dispensable()

    def _told_by(self, step: int, index: int) -> tuple[str, FileRecord, list[StoredPiece]]:
        key = self._key(step, index)
        self.store.wait([key], FOREVER)
        told = self.store.get(key).decode()
        self.store.delete_key(key)
        if not told:
            raise OSError(f"rank {self.ranks[index]} could not write its shard")
        name, record, pieces = json.loads(told)
        return name, FileRecord(*record), [StoredPiece(*piece) for piece in pieces]

    def _put_in_place(self, partial: Path, place: Path) -> None:
        sync(partial)
        if place.exists():
            supersede(place)
        partial.rename(place)
        sync(self.root)

    def _remove_dispensable(self) -> None:
        folders = {int(path.name.removeprefix("step-")): path for path in candidates(self.root)}
        for step in self.retention.dispensable(list(folders)):
            remove(folders[step])

    @staticmethod
    def _key(step: int, index: int) -> str:
        return f"imdm_scale/checkpoint/{step}/{index}"


def supersede(folder: Path) -> Path:
    """Give a checkpoint a name under which no run goes on from it; returns the new one."""
    target = folder.with_name(f"superseded-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    return folder.rename(target)


def remove(folder: Path) -> None:
    """Remove a checkpoint: at no moment is there a part of it under its name."""
    going = partial_path(folder)
    os.rename(folder, going)
    shutil.rmtree(going)


def remove_unfinished(root: Path) -> None:
    """Remove what a run that was killed left half written or half removed."""
    if root.is_dir():
        for path in root.glob(f".step-*{PARTIAL}"):
            shutil.rmtree(path)
