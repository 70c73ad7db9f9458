"""Going on with a run that was stopped: which checkpoint, and whether it is one of this run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from imdm_scale.checkpoint.background import supersede
from imdm_scale.checkpoint.manifest import Manifest
from imdm_scale.checkpoint.verify import candidates, damages, none_whole
from imdm_scale.config.architecture import Architecture
from imdm_scale.config.model_folder import CHECKPOINTS, LATEST
from imdm_scale.config.tree import Config
from imdm_scale.data.place import Place
from imdm_scale.data.stream import Stream
from imdm_scale.distill.loop import Progress
from imdm_scale.distill.training_data import told_by
from imdm_scale.errors import UserError

DEPENDED_ON = (
    "seed",
    "train.global_batch_size",
    "method.name",
    "method.initial_steps",
    "method.steps_per_round",
)
"""Settings with which a run must go on as it began: what was drawn, counted or taught depends on them."""
WITHOUT_EFFECT = (
    "run_dir",
    "resume",
    "data.",
    "tokenizer.",
    "teacher.",
    "parallel.",
    "train.micro_batch_size",
    "train.save_every",
    "train.keep_",
    "train.recompute",
    "train.init_from",
    "log.",
    "evaluate.",
)
"""Beginnings of settings that may change without a word: no number depends on them, or they are compared otherwise."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint from which a run goes on."""

    folder: Path
    manifest: Manifest

    @property
    def progress(self) -> Progress:
        """How far the run was."""
        return Progress(**{field.name: self.manifest.progress[field.name] for field in fields(Progress)})

    @property
    def teacher_folder(self) -> Path | None:
        """Weights of the teacher, where it is a past student."""
        teacher = self.manifest.teacher
        return self.folder / teacher["weights"] if teacher and "weights" in teacher else None

    def lies_in(self, run_dir: Path) -> bool:
        """Whether it is one of the run's own."""
        return self.folder.resolve().parent == (run_dir / CHECKPOINTS).resolve()


def find_resumed(config: Config, main_rank: int, console: Console) -> Resumed | None:
    """The newest whole checkpoint that `resume` names; what is passed over is told. Collective.

    Every rank reads a share of the files.

    Returns:
        None where the run begins anew.

    Raises:
        UserError: on all ranks: there is no such checkpoint.
    """
    if config.resume is None:
        return None
    path = Path(config.run_dir if config.resume == LATEST else config.resume)
    passed_over = []
    for folder in told_by(main_rank, lambda: candidates(path)):
        manifest, found = told_by(main_rank, lambda folder=folder: _manifest(folder))  # type: ignore[misc]
        if manifest is not None:
            shares: list[Any] = [None] * dist.get_world_size()
            own = list(manifest.files.items())[dist.get_rank() :: dist.get_world_size()]
            dist.all_gather_object(shares, list(damages(folder, own)))
            found = [damage for share in shares for damage in share]
            if not found:
                return Resumed(folder, manifest)
        passed_over.append(f"{folder}: {'; '.join(found)}")
        console.print(f"passed over {passed_over[-1]}", highlight=False, soft_wrap=True)
    if config.resume == LATEST and not passed_over:
        return None
    raise none_whole(path, passed_over)


def _manifest(folder: Path) -> tuple[Manifest | None, list[str]]:
    try:
        return Manifest.read(folder), []
    except UserError as error:
        return None, [str(error)]


def check_resumed(resumed: Resumed, config: Config, architecture: Architecture) -> list[str]:
    """Compare a run's settings with those of its checkpoint.

    Returns:
        In words, what has been changed and has an effect from now on.

    Raises:
        UserError: a setting on which what was done so far depends.
    """
    saved = asdict(resumed.manifest.network())
    for name, value in asdict(architecture).items():
        if name != "dropout" and value != saved[name]:
            raise UserError(
                f"{name} is {value}, but {saved[name]} in {resumed.folder}, from which the run is to go on; "
                "set model.* (or tokenizer.path) as it was, or begin anew with resume=null."
            )
    before, now = dict(_flat(resumed.manifest.config)), dict(_flat(asdict(config)))
    for name in DEPENDED_ON:
        if now[name] != before.get(name):
            raise UserError(
                f"{name} is {now[name]}, but {before.get(name)} in {resumed.folder}, from which the run is to go on; "
                f"set {name}={before.get(name)}, or begin anew with resume=null."
            )
    return [
        f"{name} {before.get(name)} -> {value}"
        for name, value in now.items()
        if value != before.get(name) and not name.startswith(WITHOUT_EFFECT) and not name.startswith("model.")
    ]


def check_place(resumed: Resumed, stream: Stream) -> int:
    """The number in the stream of the run's first sample.

    Raises:
        UserError: the data are others than those of the checkpoint, or in another order.
    """
    assert resumed.manifest.data is not None, "a run has data"
    place = Place(**resumed.manifest.data)
    place.check(stream, f"the checkpoint {resumed.folder}", "begin anew with resume=null")
    return place.samples - resumed.progress.step * int(resumed.manifest.config["train"]["global_batch_size"])


def check_teacher(resumed: Resumed, folder: Path, sha256: str) -> None:
    """Compare the weights of the teacher's folder with those from which the run began.

    Raises:
        UserError: they are others.
    """
    teacher = resumed.manifest.teacher
    if teacher is not None and teacher.get("sha256") not in (None, sha256):
        raise UserError(
            f"the teacher in {folder} has other weights (SHA-256 {sha256[:12]}) than that of {resumed.folder} "
            f"({teacher['sha256'][:12]}, then in {teacher['path']}); set teacher.path to the one it began with, or "
            "begin anew with resume=null."
        )


def set_newer_aside(resumed: Resumed) -> list[Path]:
    """Rename the run's checkpoints that are newer than the one from which it goes on: they are of another course of the
    run, or damaged.

    Returns:
        What they are called now.
    """
    newer = [
        folder
        for folder in candidates(resumed.folder.parent)
        if int(folder.name.removeprefix("step-")) > resumed.manifest.step
    ]
    return [supersede(folder) for folder in newer]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
