"""Runs that are killed: at a numbered event, of which every stage of a save and every update has some, or at a time."""

from __future__ import annotations

import itertools
import os
import pkgutil
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

from imdm_scale.checkpoint.manifest import Manifest
from imdm_scale.checkpoint.verify import newest_whole
from imdm_scale.config.model_folder import CHECKPOINTS, LATEST
from tests.distributed.pool import Ended, RankPool
from tests.distributed.product import Run, train_product

STAGES: dict[str, tuple[str, ...]] = {
    "imdm_scale.checkpoint.background.CheckpointWriter": (
        "_make_partial",
        "_write",
        "_told_by",
        "_put_in_place",
        "_remove_dispensable",
    ),
    "imdm_scale.checkpoint.background": ("write_shard_file", "record_of", "sync", "write_whole", "remove"),
    "imdm_scale.checkpoint.shard_file": ("record_of",),
    "imdm_scale.checkpoint.manifest.Manifest": ("write",),
    "imdm_scale.checkpoint.manifest": ("write_whole",),
    "imdm_scale.data.durable": ("sync",),
    "imdm_scale.hf.safetensors_writer.SafetensorsWriter": ("write", "__exit__"),
    "imdm_scale.hf.export": ("replace_folder",),
    "imdm_scale.distill.saving": ("snapshot", "link_files", "export_model", "write_description"),
    "imdm_scale.parallel.engine.Student": ("step",),
    "shutil": ("rmtree",),
}
"""Where -> functions before and after which a rank may be killed."""


@dataclass(frozen=True)
class Kill:
    """The death of one rank."""

    rank: int
    stage: str | None = None
    """Where it dies, such as `before Manifest.write`; None: at a time."""
    occurrence: int = 0
    """At which of the times when it comes there, from 0."""
    after: float = 0.0
    """Seconds after which it dies."""


@contextmanager
def dying(kill: Kill | None, report: Path) -> Iterator[None]:
    """This rank is killed inside the block as `kill` says, if it says so of this rank; where is written to `report`."""
    times = itertools.count()

    def die(where: str) -> None:
        report.write_text(where)
        os.kill(os.getpid(), signal.SIGKILL)

    def at(where: str) -> None:
        if kill is not None and where == kill.stage and next(times) == kill.occurrence:
            die(where)

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            at(f"before {name}")
            result = function(*arguments, **options)
            at(f"after {name}")
            return result

        return call

    if kill is None or int(os.environ["RANK"]) != kill.rank:
        yield
        return
    with ExitStack() as stack:
        for place, names in STAGES.items():
            for name in names:
                target = pkgutil.resolve_name(place)
                patched = watched(vars(target)[name], _label(place, name))
                stack.enter_context(mock.patch.object(target, name, patched))
        if kill.stage is None:

            def wait_and_die() -> None:
                time.sleep(kill.after)
                die(f"after {kill.after:.2f} s")

            Thread(target=wait_and_die, daemon=True).start()
        yield


def train_and_die(config: Any, stage: int, kill: Kill | None, report: Path) -> None:
    """The training program as a launcher starts it."""
    from imdm_scale.parallel.process import end_process_group, failures_reported, start_process_group

    with failures_reported():
        start_process_group()
        with dying(kill, report):
            train_product(config, stage)
        end_process_group()


def launch(pool: RankPool, run: Run, folder: Path, kill: Kill | None, *words: str) -> Ended:
    """Start the run; it goes on from what there is."""
    return pool.launch(
        train_and_die,
        run.world_size,
        config=run.config(folder, "resume=latest", *words),
        stage=run.stage,
        kill=kill,
        report=folder / "killed",
    )


def random_kills(seed: int, world_size: int, seconds: float) -> Iterator[Kill]:
    """Endless kills: three of four at a stage, each as likely as any other, the others at a time."""
    draw = random.Random(seed)
    stages = [
        f"{when} {_label(place, name)}"
        for place, names in STAGES.items()
        for name in names
        for when in ("before", "after")
    ]
    while True:
        rank, stage = draw.randrange(world_size), draw.choice(stages)
        many = 100 if stage.endswith("SafetensorsWriter.write") else 3
        occurrence, after = draw.randrange(many), draw.uniform(0.0, seconds)
        yield Kill(rank, stage, occurrence) if draw.random() < 0.75 else Kill(rank, after=after)


def _label(place: str, name: str) -> str:
    return f"{place.rpartition('.')[2]}.{name}"


def finished_step(folder: Path) -> int:
    """The update whose checkpoint is said to be finished; 0 where none is."""
    latest = folder / "run" / CHECKPOINTS / LATEST
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def whole_step(folder: Path) -> int:
    """The update of the newest whole checkpoint; 0 where there is none."""
    root = folder / "run" / CHECKPOINTS
    if not root.is_dir() or not any(root.glob("step-*")):
        return 0
    found: Manifest = newest_whole(folder / "run")[1]
    return found.step
