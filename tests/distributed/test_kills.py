"""A rank is killed at any instant, any number of times: nothing that was saved is lost, and the run that goes on is the
undisturbed one, bit for bit. `tests/soak/kill_runs.py` does the same at full count.
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.killing import Kill, finished_step, launch, whole_step
from tests.distributed.layouts import micro_batches, student
from tests.distributed.pool import RankPool
from tests.distributed.product import Run, losses_of, student_of, write_teacher

SHORT = ("train.max_steps=4", "train.save_every=1", "train.keep_every=0", "method.steps_per_round=2")
RUNS = [
    Run((*SHORT, *student(2), *micro_batches(2, 1)), 3, 2),
    Run((*SHORT, *student(), *micro_batches(2)), 1, 2),
]
KILLS = [
    [
        Kill(0, "before Manifest.write", 0),
        Kill(1, "before SafetensorsWriter.write", 130),
        Kill(0, "after CheckpointWriter._put_in_place", 0),
    ],
    [
        Kill(0, "before shutil.rmtree", 0),
        Kill(1, "after CheckpointWriter._write", 0),
        Kill(0, "before background.write_whole", 0),
        Kill(1, "before Student.step", 1),
        Kill(0, "before export.replace_folder", 0),
    ],
]
"""Amid the second rank's second shard; between a checkpoint's name and `latest`; amid the removal of an old one; ..."""


@pytest.mark.parametrize(
    ("run", "kills"), list(zip(RUNS, KILLS, strict=True)), ids=["tensor-parallel", "data-parallel"]
)
def test_a_run_that_is_killed_again_and_again(
    pool: RankPool, tmp_path: Path, run: Run, kills: list[Kill]
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, folder):
        place.mkdir()
        write_teacher(place)
    assert launch(pool, run, whole, None).exit_codes == [0, 0]
    for kill in kills:
        before = finished_step(folder)
        ended = launch(pool, run, folder, kill)
        assert ended.exit_codes[kill.rank] == -signal.SIGKILL, ended.output
        assert whole_step(folder) >= finished_step(folder) >= before
    assert launch(pool, run, folder, None).exit_codes == [0, 0]
    assert losses_of(folder) == losses_of(whole)
    expected, found = student_of(whole), student_of(folder)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert not list((folder / "run" / "checkpoints").glob(".*"))
