"""An unfinished preparation: what is finished of it, in `progress.json` beside the shards.

The file is replaced as a whole after each shard. For each shard it holds a place in the corpus from which packing can
go on: the last end of a batch of rows before the shard's last block, with the ids that were left there. To go on means
to read from the row there, and to pass over those blocks that the finished shards hold already.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from imdm_scale.data.durable import write_whole
from imdm_scale.data.manifest import Manifest, Shard, Split
from imdm_scale.data.output_folder import PROGRESS_FILE, SPLITS, refuse_other_choices, writing
from imdm_scale.data.packing import EMPTY, PackState
from imdm_scale.data.shards import file_hash
from imdm_scale.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedShard:
    """A shard on the disk, and a place at or before its last block from which packing can go on."""

    shard: Shard
    state: PackState


@dataclass
class SplitProgress:
    """What is finished of one split."""

    identity: str
    """`Documents.identity` of the text."""
    shards: list[FinishedShard] = field(default_factory=list)
    """In order, without a gap."""
    end: PackState | None = None
    """The counts of the whole split, once all its shards are finished."""

    @property
    def state(self) -> PackState:
        """The place from which to go on."""
        return self.shards[-1].state if self.shards else EMPTY

    @property
    def num_blocks(self) -> int:
        """Blocks in the finished shards."""
        return sum(finished.shard.num_blocks for finished in self.shards)

    def summary(self) -> Split:
        """The split as the manifest describes it, once it is finished."""
        assert self.end is not None
        shards = tuple(finished.shard for finished in self.shards)
        return Split(self.end.num_documents, self.end.num_tokens, self.end.num_dropped, shards)


@dataclass
class Unfinished:
    """What is finished of a preparation."""

    plan: Manifest
    """The manifest to be, without its splits: all choices that decide about the bytes."""
    splits: dict[str, SplitProgress]

    def save(self, folder: Path) -> None:
        """Replaces `folder`'s progress file.

        Raises:
            OSError: the file cannot be written.
        """
        write_whole(folder / PROGRESS_FILE, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Unfinished | None:
        """What `folder`'s progress file says; None if there is none.

        Raises:
            UserError: it cannot be understood.
        """
        file = folder / PROGRESS_FILE
        try:
            content = json.loads(file.read_bytes())
            plan = Manifest.from_json(json.dumps(content["plan"]), str(folder))
            splits = {name: _split_progress(split) for name, split in content["splits"].items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}, which says what is finished of the preparation in this folder, cannot be understood "
                f"({type(error).__name__}: {error}); delete the folder, or choose another one."
            ) from None
        return cls(plan, splits)

    def drop_damaged(self, folder: Path) -> None:
        """Forgets each split's first shard that is not on the disk as it was written, and all after it.

        Reads every byte of the finished shards. What is forgotten is made again.
        """
        for split in self.splits.values():
            for number, finished in enumerate(split.shards):
                damage = damage_of(folder / finished.shard.file, finished.shard)
                if damage is not None:
                    logger.warning(
                        "%s/%s %s; it and what follows it is made again", folder, finished.shard.file, damage
                    )
                    split.shards, split.end = split.shards[:number], None
                    break


def begin_or_go_on(folder: Path, plan: Manifest, identities: dict[str, str]) -> Unfinished:
    """What is finished in `folder` of the preparation that `plan` describes; nothing at first.

    Where the choices or the text have changed and a shard is finished, the preparation is refused: the shards may be
    hours of work, and only the user knows which of the two was named by mistake. Where none is, it begins anew.

    Args:
        identities: of the splits' texts.

    Raises:
        UserError: the folder holds shards of something else.
    """
    begun = Unfinished(plan, {name: SplitProgress(identity) for name, identity in identities.items()})
    earlier = Unfinished.load(folder)
    if earlier is None:
        return begun
    texts_before = {name: split.identity for name, split in earlier.splits.items()}
    if any(split.shards for split in earlier.splits.values()):
        refuse_other_choices(folder, earlier.plan, plan)
        for name in sorted({*texts_before, *identities}):
            if texts_before.get(name) != identities.get(name):
                raise UserError(
                    f"The text of the {name} split is not what it was when its preparation in {folder} began; bring "
                    "that text back to go on, or delete the folder or choose another one to begin anew."
                )
        earlier.drop_damaged(folder)
        return earlier
    if (earlier.plan, texts_before) != (plan, identities):
        with writing(folder):  # shards that are on the disk, but not in the progress file yet
            for name in SPLITS:
                if (folder / name).exists():
                    shutil.rmtree(folder / name)
        return begun
    return earlier


def _split_progress(content: dict) -> SplitProgress:
    shards = [FinishedShard(Shard(**item["shard"]), _pack_state(item["state"])) for item in content["shards"]]
    end = content["end"] and _pack_state(content["end"])
    return SplitProgress(content["identity"], shards, end)


def _pack_state(content: dict) -> PackState:
    return PackState(**{**content, "rest": tuple(content["rest"])})


def damage_of(file: Path, shard: Shard) -> str | None:
    """What is wrong with a finished shard; None if nothing is."""
    try:
        num_bytes = file.stat().st_size
        if num_bytes != shard.num_bytes:
            return f"has {num_bytes} bytes instead of {shard.num_bytes}"
        return None if file_hash(file) == shard.sha256 else "has not the bytes that were written (SHA-256)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
