"""A bounded folder of shards that all processes of a node share.

    DIR/shards/SHA256.npy     a whole shard, named by its content: runs and corpora share it
    DIR/shards/SHA256.part    one that is being fetched; of the shard's full size from the beginning
    DIR/locks/SHA256.lock     held while the shard is fetched, so that one process does it and the others wait
    DIR/locks/SHA256.failed   why the last try failed
    DIR/locks/room.lock       held while room is made, and while a fetched shard takes its name

The kernel frees the locks of a process that dies. The time of a file's last change is that of its last use, and those
that were not used for longest go first. A process may still map a file that another one removes: its data stay on
the disk until the last map is dropped.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import filelock

from imdm_scale.data.manifest import Shard
from imdm_scale.data.verified import DamagedShard
from imdm_scale.errors import UserError

ROOM_POLL = 0.05
"""Seconds between two looks whether fetches of others have ended, when these leave no room."""


class ShardCache:
    """The cache in a folder.

    Args:
        directory: the folder; made if need be.
        max_bytes: the shards in it, with those being fetched, are never larger together.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._shards, self._locks = directory / "shards", directory / "locks"
        with self.writing():
            self._shards.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)

    def open(self, shard: Shard, fetch: Callable[[BinaryIO], None]) -> BufferedReader:
        """Opens a shard's file, fetched first if it is not here.

        Args:
            fetch: writes the whole shard to a stream, or raises DamagedShard. Called by one process at a time; one
                that waited while another one tried in vain takes over its failure.

        Raises:
            DamagedShard: as `fetch`.
            UserError: the cache is too small for this shard, or cannot be written.
        """
        asked = time.time_ns()
        with self.writing():
            while True:
                # Another process may remove the file as soon as it is here; then it is fetched again.
                with contextlib.suppress(FileNotFoundError):
                    return self._open_present(shard)
                with self.lock(shard.sha256):
                    if not self._file(shard).exists():
                        self._take_over_failure(shard, asked)
                        self._fetch(shard, fetch)

    def discard(self, shard: Shard) -> None:
        """Removes a shard that turned out to be damaged on the disk."""
        with self.writing():
            self._file(shard).unlink(missing_ok=True)

    def lock(self, name: str) -> filelock.BaseFileLock:
        """A lock that one thread of one of this node's processes holds at a time."""
        return filelock.FileLock(self._locks / f"{name}.lock")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what goes wrong on the disk into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The cache in data.cache_dir {self.directory} cannot be written "
                f"({error.strerror or type(error).__name__}); free space there, lower data.cache_gib (now "
                f"{self.max_bytes / 2**30:.3g}), or name another folder in data.cache_dir."
            ) from None

    def _file(self, shard: Shard) -> Path:
        return self._shards / f"{shard.sha256}.npy"

    def _open_present(self, shard: Shard) -> BufferedReader:
        stream = self._file(shard).open("rb")
        now = time.time_ns()
        os.utime(stream.fileno(), ns=(now, now))
        return stream

    def _take_over_failure(self, shard: Shard, asked: int) -> None:
        """Raises the failure of another process that ended after this one asked: it tried in its place."""
        failure = self._locks / f"{shard.sha256}.failed"
        with contextlib.suppress(FileNotFoundError):
            if failure.stat().st_mtime_ns >= asked:
                raise DamagedShard(failure.read_text())

    def _fetch(self, shard: Shard, fetch: Callable[[BinaryIO], None]) -> None:
        """Fetches a shard whose lock this process holds."""
        failure = self._locks / f"{shard.sha256}.failed"
        part = self._reserve(shard)
        try:
            with part.open("r+b") as stream:
                fetch(stream)
            with self.lock("room"):
                part.replace(self._file(shard))
            failure.unlink(missing_ok=True)
        except DamagedShard as error:
            failure.write_text(str(error))
            raise
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, shard: Shard) -> Path:
        """Makes room for a shard; the sparse file of its full size, which counts from now on."""
        if shard.num_bytes > self.max_bytes:
            raise UserError(
                f"data.cache_gib is {self.max_bytes / 2**30:.3g}, which does not hold {shard.file} of "
                f"{shard.num_bytes / 2**30:.3g} GiB; raise it to two windows of shards or more."
            )
        part = self._file(shard).with_suffix(".part")
        while True:
            with self.lock("room"):
                part.unlink(missing_ok=True)  # of a process that died
                if self._make_room(shard.num_bytes):
                    with part.open("wb") as stream:
                        stream.truncate(shard.num_bytes)
                    return part
            time.sleep(ROOM_POLL)

    def _make_room(self, num_bytes: int) -> bool:
        """Removes the shards that were not used for longest; False if others fetch too much at the moment."""
        whole: list[tuple[int, int, Path]] = []
        fetched = 0
        for entry in os.scandir(self._shards):
            file = Path(entry.path)
            try:
                stat = file.stat()
            except FileNotFoundError:
                continue  # another process gave up
            if file.suffix != ".part":
                whole.append((stat.st_mtime_ns, stat.st_size, file))
            elif not self._remove_if_dead(file):
                fetched += stat.st_size
        if fetched + num_bytes > self.max_bytes:
            return False
        excess = fetched + num_bytes + sum(size for _, size, _ in whole) - self.max_bytes
        for _, size, file in sorted(whole):
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= size
        return True

    def _remove_if_dead(self, part: Path) -> bool:
        """Removes an unfinished file whose lock nobody holds."""
        try:
            with self.lock(part.stem).acquire(blocking=False):
                part.unlink(missing_ok=True)
                return True
        except filelock.Timeout:
            return False
