"""The folder in which pairs come to lie, shard by shard, in whatever order and by however many programs.

    OUT/plan.json                    the manifest to be, without its shards: what all programs agree on
    OUT/finished/00000.json          what a finished shard's line in the manifest is
    OUT/train/00000.npy ...          the pairs
    OUT/manifest.json                written last, by whichever program finds all shards finished

Shard k holds the pairs from k x shard_pairs on, and each pair is a function of its number and of the plan. So a shard
that an interruption left out is simply made again, and nothing can be missing or there twice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from imdm_scale.data.durable import partial_path, put_in_place, write_whole
from imdm_scale.data.manifest import FILE_NAME, TOKENIZER_FOLDER, Manifest, Shard, Split
from imdm_scale.data.output_folder import LOCK_FILE, finished_manifest, refuse_other_choices, writing
from imdm_scale.data.resuming import damage_of
from imdm_scale.data.shards import ShardWriter
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
FINISHED = "finished"
SPLIT = "train"
TEXT_FOLDER = "data"
"""Where text is that was prepared for the pairs."""
PLAN_SECONDS = 60.0
"""For how long another program may hold the plan."""


def data_lock(out: Path) -> Path:
    """Held by the program that prepares text below `out`."""
    return out / ".data.lock"


@dataclass(frozen=True)
class PairFolder:
    """A folder of pairs that is being made. One process of a program uses it."""

    out: Path
    plan: Manifest
    """The manifest without its splits."""

    @property
    def num_pairs(self) -> int:
        """Pairs of the whole folder."""
        return self.plan.options["num_pairs"]

    @property
    def shard_pairs(self) -> int:
        """Pairs of every shard but the last, which may be shorter."""
        return self.plan.options["shard_pairs"]

    @property
    def num_shards(self) -> int:
        """Shards of the whole folder."""
        return -(-self.num_pairs // self.shard_pairs)

    def numbers(self, shard: int) -> range:
        """The pairs of a shard."""
        first = shard * self.shard_pairs
        return range(first, min(first + self.shard_pairs, self.num_pairs))

    def begin(self, tokenizer: Tokenizer) -> bool:
        """Makes the folder, or finds that it is that of this plan; returns whether all of it is finished.

        Raises:
            UserError: it holds something else, or cannot be written.
        """
        if finished_manifest(self.out, self.plan) is not None:
            return True
        with self._alone():
            if (self.out / FILE_NAME).exists():  # by another program, just before this one was alone
                return finished_manifest(self.out, self.plan) is not None
            self._agree(tokenizer)
        return False

    def is_finished(self, shard: int) -> bool:
        """Whether a shard is on the disk as it was written; reads its bytes."""
        if (self.out / FILE_NAME).exists():
            return True
        try:
            noted = Shard(**json.loads(self._note(shard).read_text()))
        except FileNotFoundError:
            return False
        damage = damage_of(self.out / noted.file, noted)
        if damage is not None:
            logger.warning("%s/%s %s; it is made again", self.out, noted.file, damage)
        return damage is None

    @contextmanager
    def claimed(self, shard: int) -> Iterator[bool]:
        """Whether the shard is this program's to make: False where another one is at it just now."""
        lock = filelock.FileLock(self.out / FINISHED / f"{shard:05}.lock", timeout=0)
        try:
            lock.acquire()
        except (filelock.Timeout, FileNotFoundError):  # of a folder that has just been finished
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def write(self, shard: int, rows_BW: np.ndarray) -> None:
        """A shard's rows; it is finished when this returns.

        Raises:
            UserError: the disk refuses.
        """
        assert len(rows_BW) == len(self.numbers(shard))
        with writing(self.out):
            # No limit of bytes: the rows of this call are one shard.
            writer = ShardWriter(self.out / SPLIT, self.plan.row_width, self.plan.dtype, 1 << 62, first=shard)
            written = [*writer.write(rows_BW), *writer.finish()]
            write_whole(self._note(shard), json.dumps(dataclasses.asdict(written[0])))

    def finish(self) -> list[int]:
        """Writes the manifest if every shard is finished, by whichever program; else says which are not.

        Raises:
            UserError: the disk refuses.
        """
        if (self.out / FILE_NAME).exists():
            return []
        with self._alone():
            return self._finish()

    def _finish(self) -> list[int]:
        """See `finish`; by the program that is alone."""
        if (self.out / FILE_NAME).exists():
            return []
        shards = []
        missing = []
        for shard in range(self.num_shards):
            try:
                shards.append(Shard(**json.loads(self._note(shard).read_text())))
            except FileNotFoundError:
                missing.append(shard)
        if missing:
            return missing
        split = Split(self.num_pairs, self.num_pairs * self.plan.length, 0, tuple(shards))
        manifest = dataclasses.replace(self.plan, splits={SPLIT: split})
        write_whole(self.out / FILE_NAME, manifest.to_json())
        shutil.rmtree(self.out / FINISHED, ignore_errors=True)
        # Who waits for the lock finds the manifest.
        for file in (self.out / PLAN_FILE, self.out / LOCK_FILE, data_lock(self.out)):
            file.unlink(missing_ok=True)
        return []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the folder's lock, which is short work for every program."""
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.out / LOCK_FILE, timeout=PLAN_SECONDS)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise UserError(
                    f"{self.out} is held by another program for more than {PLAN_SECONDS:.0f} seconds; end it, or "
                    "choose another folder."
                ) from None
            try:
                yield
            finally:
                lock.release()

    def _note(self, shard: int) -> Path:
        return self.out / FINISHED / f"{shard:05}.json"

    def _agree(self, tokenizer: Tokenizer) -> None:
        """Writes the plan, or compares with the one that is there."""
        file = self.out / PLAN_FILE
        if file.exists():
            refuse_other_choices(self.out, Manifest.from_json(file.read_bytes(), str(self.out)), self.plan)
            return
        names = sorted(entry.name for entry in self.out.iterdir() if entry.name != LOCK_FILE)
        folder = self.out / TOKENIZER_FOLDER
        own = {partial_path(file).name, folder.name, partial_path(folder).name, FINISHED, TEXT_FOLDER}
        own.add(data_lock(self.out).name)
        if not own.issuperset(names):
            raise UserError(
                f"{self.out} holds files that no generation of pairs left there ({', '.join(names[:3])}); choose an "
                "empty or a new folder."
            )
        (self.out / FINISHED).mkdir(exist_ok=True)
        for old in (partial_path(folder), folder):
            shutil.rmtree(old, ignore_errors=True)
        partial_path(folder).mkdir()
        tokenizer.save(partial_path(folder))
        put_in_place(folder)
        write_whole(file, self.plan.to_json())
