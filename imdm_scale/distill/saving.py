"""What a run saves, and when: its state in checkpoints, its teachers and its student as exported models."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imdm_scale.assets import TEACHER as TEACHER_FOLDER
from imdm_scale.checkpoint.background import CheckpointWriter, Retention
from imdm_scale.checkpoint.description import write_description
from imdm_scale.checkpoint.facts import run_facts
from imdm_scale.checkpoint.manifest import Manifest
from imdm_scale.checkpoint.save import export_model
from imdm_scale.checkpoint.stored_model import open_model
from imdm_scale.config.layout import RoleLayout, RunLayout
from imdm_scale.config.model_folder import CHECKPOINTS, STUDENT
from imdm_scale.config.tree import Config
from imdm_scale.data.durable import partial_path
from imdm_scale.data.place import Place
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.distill.build import Parts
from imdm_scale.distill.ema import Ema
from imdm_scale.distill.loop import Progress, Update, train
from imdm_scale.distill.method import Method
from imdm_scale.distill.rounds import Round
from imdm_scale.distill.student_state import KINDS, counters, snapshot
from imdm_scale.distill.training_data import TrainingData
from imdm_scale.evaluate.provenance import provenance
from imdm_scale.parallel.engine import Student

TEACHERS = "teachers"
"""Of a run's folder: the teachers that the student was."""
TEACHER = "teacher"
"""Of a checkpoint: the folder with a past student's weights, where such is the teacher."""


class RunSaver:
    """Writes a run's checkpoints. On every rank of the student.

    Args:
        argv: the words of the command.
        source_folder: where the run's first weights come from; None where they are fresh.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        student: Student,
        ema: Ema,
        data: TrainingData,
        tokenizer: Tokenizer,
        order: TokenOrder,
        run_dir: Path,
        argv: list[str],
        source_folder: Path | None,
    ) -> None:
        self.config, self.ds_config = config, ds_config
        self.student, self.ema, self.run_dir = student, ema, run_dir
        self.data, self.tokenizer, self.order = data, tokenizer, order
        self.source_folder = source_folder
        self.teacher_folder: Path | None = None
        """Exported weights of the past student that is the teacher, where it is one."""
        self.began_as = {None: "initial values", TEACHER_FOLDER: "the packaged teacher"}.get(
            source_folder, str(source_folder)
        )
        self.made_by = provenance(argv, student.groups.everyone.size(), student.device.type)
        self.made_by["began as"] = self.began_as
        self._source_record: dict[str, Any] | None = None
        self.writer = CheckpointWriter(
            run_dir / CHECKPOINTS,
            student.groups.layout.ranks,
            student.groups.everyone,
            Retention(config.train.keep_last, config.train.keep_every),
        )

    def place(self, step: int) -> Place:
        """Where the run is in its data after `step` updates."""
        samples = self.data.first_sample + step * self.config.train.global_batch_size
        return Place.of(self.data.stream, samples)

    def keep_teacher(self, folder: Path, method: Method, step: int) -> None:
        """The run goes on with update `step` under the teacher in the folder of a checkpoint, which will not be there
        for ever."""
        round_ = method.round_at(step - 1)
        assert round_ is not None, "its last update belongs to a round"
        self.teacher_folder = self._teacher_folder(round_)
        if self.writer.index == 0:
            partial = partial_path(self.teacher_folder)
            for place in (partial, self.teacher_folder):
                if place.exists():
                    shutil.rmtree(place)
            link_files(folder, partial)
            partial.rename(self.teacher_folder)

    def _teacher_folder(self, round_: Round) -> Path:
        return self.run_dir / TEACHERS / f"round-{round_.index:02d}"

    def export_teacher(self, round_: Round, step: int) -> None:
        """Write the student's present weights, which have just become the round's teacher."""
        self.teacher_folder = self._teacher_folder(round_)
        self._export(self.teacher_folder, step, "as trained")

    def export_student(self, step: int) -> None:
        """Write the averaged student."""
        with self.ema.in_student():
            self._export(self.run_dir / STUDENT, step, "moving averages")

    def _export(self, folder: Path, step: int, weights: str) -> None:
        place = self.place(step)
        facts = run_facts(
            self.config.method.name, step, dataclasses.asdict(place), self.began_as, weights, self.made_by
        )
        export_model(self.student, self.tokenizer, self.data.bos_id, folder, place, self.order, facts)

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint. Collective over the student's ranks."""
        taken = snapshot(self.student, self.ema)
        counted = {**dataclasses.asdict(progress), **counters(self.student, self.ema)}
        place, teacher_folder = self.place(progress.step), self.teacher_folder

        def manifest() -> Manifest:
            return Manifest(
                step=progress.step,
                kinds=KINDS,
                architecture=dataclasses.asdict(self.student.architecture),
                layout=layout_record(self.student.groups.layout),
                progress=counted,
                data=dataclasses.asdict(place),
                teacher={"weights": TEACHER} if teacher_folder is not None else self._source(),
                config=dataclasses.asdict(self.config),
                deepspeed=self.ds_config,
                made_by=self.made_by,
                pieces={},
                files={},
            )

        def add_files(folder: Path) -> None:
            write_description(
                folder, self.student.architecture, self.tokenizer, self.data.bos_id, self.order, place
            )
            if teacher_folder is not None:
                link_files(teacher_folder, folder / TEACHER)

        self.writer.save(progress.step, taken, manifest, add_files)

    def _source(self) -> dict[str, Any] | None:
        """The first teacher, which does not change: hashed once, in the writing thread."""
        if self.source_folder is None or not self.config.method.has_teacher:
            return None
        if self._source_record is None:
            self._source_record = {
                "path": str(self.source_folder),
                "sha256": weights_hash(self.source_folder),
            }
        return self._source_record


def train_and_save(
    config: Config,
    layout: RunLayout,
    method: Method,
    parts: Parts,
    saver: RunSaver,
    begun: Progress,
    after_update: Callable[[Update], None],
) -> int:
    """Train, save on the way and at the end, export every teacher and the averaged student.

    Returns:
        Number of updates done.
    """
    last = begun

    def save_when_due(update: Update) -> None:
        nonlocal last
        last = update.progress
        after_update(update)
        saver.writer.poll()
        if update.step % config.train.save_every == 0:
            saver.save(last)

    train(config, layout, method, parts, save_when_due, saver.export_teacher, begun)
    if saver.writer.last_step != last.step:
        saver.save(last)
    saver.export_student(last.step)
    saver.writer.wait()
    return last.step


def weights_hash(folder: Path) -> str:
    """SHA-256 that tells a model's weights from others'."""
    return open_model(folder).sha256()


def layout_record(layout: RoleLayout) -> dict[str, Any]:
    """A layout for a manifest."""
    return {
        "ranks": len(layout.ranks),
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "zero_stage": layout.zero_stage,
        "virtual_stages": layout.virtual_stages,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batch_size": layout.micro_batch_size,
    }


def link_files(source: Path, target: Path) -> None:
    """The files of a folder under another name, without their bytes being written again where the disk can do that.

    Exported files are never changed, only replaced.
    """
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        try:
            os.link(path, target / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, target / path.name)
