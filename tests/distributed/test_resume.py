"""A run that goes on from a checkpoint is the run that was not interrupted: bit for bit under the same layout, to
rounding under every other, the optimizer's state and the average included.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from imdm_scale.checkpoint.inspection import diff
from imdm_scale.checkpoint.to_hf import to_hf
from tests.distributed.layouts import disaggregated, micro_batches, student, teacher
from tests.distributed.parity import largest_gap
from tests.distributed.pool import RankPool
from tests.distributed.product import Run, losses_of, student_of, train_product, write_teacher

LOSS, WEIGHT = 1e-5, 2e-5
SAVED_AT, END = 9, 29
"""In the second round of seven updates: the teacher is a past student."""

ONE = Run((), 0, 1)
SAVED = [
    ONE,
    Run((*student(2), *teacher(1, 2), *micro_batches(2)), 1, 4),
    Run((*student(2, 2), *teacher(), *micro_batches(2)), 3, 4),
    Run((*student(), *teacher(2), *micro_batches(1)), 3, 2),
    Run((*student(), *micro_batches(2)), 2, 2),
]
TARGETS = [
    Run((*student(1, 2), *micro_batches(2)), 0, 2),
    Run((*student(2), *micro_batches(2)), 3, 4),
    Run((*student(4), *micro_batches(4, 2)), 1, 4),
    Run((*student(1, 2), *teacher(2), *micro_batches(2)), 2, 4),
    Run((*student(), *teacher(1, 2), *disaggregated(2)), 3, 4),
]


def go(pool: RankPool, run: Run, folder: Path, *words: str) -> None:
    pool.run(train_product, run.world_size, config=run.config(folder, *words), stage=run.stage)


def branch(saved: Path, folder: Path) -> Path:
    """The run as it was after the checkpoint, as if it had been killed some updates later."""
    checkpoint = f"checkpoints/step-{SAVED_AT:08d}"
    shutil.copytree(saved / "run" / checkpoint, folder / "run" / checkpoint)
    shutil.copytree(saved / "teacher", folder / "teacher")
    lines = (saved / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "run" / "metrics.jsonl").write_text("".join(lines[: SAVED_AT + 3]) + '{"step": 13, "lo')
    return folder


def export(checkpoint: Path, out: Path) -> None:
    """The checkpoint's averaged weights, as `tools/convert.py to-hf` writes them."""
    to_hf(checkpoint, out, kind=None, dtype=None, max_shard_size="5GB", check=False, say=lambda line: None)


@pytest.fixture(scope="module")
def finished(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Path]:
    """Every run of SAVED, uninterrupted."""
    folders = {}
    for run in SAVED:
        folders[run] = tmp_path_factory.mktemp("finished")
        write_teacher(folders[run])
        go(pool, run, folders[run])
    return folders


@pytest.mark.parametrize("run", SAVED, ids=str)
def test_the_same_layout_goes_on_bit_for_bit(
    pool: RankPool, finished: dict[Run, Path], tmp_path: Path, run: Run
) -> None:
    whole, folder = finished[run], branch(finished[run], tmp_path)
    if run is SAVED[2]:  # stopped once more on the way
        go(pool, run, folder, "resume=latest", "train.max_steps=15")
    go(pool, run, folder, "resume=latest")
    assert losses_of(folder) == losses_of(whole)
    expected, found = student_of(whole), student_of(folder)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("saved", "target", "last"),
    # To the end with one target of each; with another for as long as it takes to see whether it is the same.
    [
        (saved, TARGETS[(i + shift) % len(TARGETS)], last)
        for i, saved in enumerate(SAVED)
        for shift, last in ((0, END), (2, SAVED_AT + 3))
    ],
    ids=str,
)
def test_every_other_layout_goes_on_the_same(
    pool: RankPool, finished: dict[Run, Path], tmp_path: Path, saved: Run, target: Run, last: int
) -> None:
    whole = finished[saved]
    write_teacher(tmp_path)
    checkpoint = whole / "run" / "checkpoints" / f"step-{SAVED_AT:08d}"
    go(pool, target, tmp_path, f"resume={checkpoint}", f"train.max_steps={last}")
    losses, expected = losses_of(tmp_path), losses_of(whole)
    assert list(losses) == list(range(SAVED_AT + 1, last + 1))
    assert max(abs(losses[step] - expected[step]) for step in losses) < LOSS
    if last == END:
        assert largest_gap(student_of(tmp_path), student_of(whole)) < WEIGHT


@pytest.mark.parametrize("target", [TARGETS[2], TARGETS[3], ONE], ids=str)
def test_every_layout_saves_and_exports_the_same(
    pool: RankPool, finished: dict[Run, Path], tmp_path: Path, target: Run
) -> None:
    """A state that was saved under TP2 x PP2 ZeRO-3, saved again under another layout: no bit is lost on the way."""
    origin = finished[SAVED[2]] / "run" / "checkpoints" / f"step-{SAVED_AT:08d}"
    write_teacher(tmp_path)
    go(pool, target, tmp_path, f"resume={origin}", f"train.max_steps={SAVED_AT}")
    copy = tmp_path / "run" / "checkpoints" / origin.name
    assert not [line for line in diff(origin, copy) if "tensors differ" in line]
    for checkpoint, name in ((origin, "origin"), (copy, "copy")):
        export(checkpoint, tmp_path / name)
    student = tmp_path / "run" / "student"
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        expected = (tmp_path / "origin" / name).read_bytes()
        assert (tmp_path / "copy" / name).read_bytes() == expected
        assert (student / name).read_bytes() == expected


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_run_and_a_checkpoint_may_be_the_teacher(
    pool: RankPool, finished: dict[Run, Path], tmp_path: Path, what: str
) -> None:
    origin = finished[SAVED[1]] / "run"
    name = origin if what == "run" else origin / "checkpoints" / f"step-{SAVED_AT:08d}"
    run = Run((f"teacher.path={name}", "train.max_steps=2", *student(2), *micro_batches(2, 1)), 3, 2)
    go(pool, run, tmp_path)
    step = 29 if what == "run" else SAVED_AT
    export(origin / "checkpoints" / f"step-{step:08d}", tmp_path / "teacher")
    (tmp_path / "exported").mkdir()
    shutil.copytree(tmp_path / "teacher", tmp_path / "exported" / "teacher")
    again = Run(("train.max_steps=2", *student(2), *micro_batches(2, 1)), 3, 2)
    go(pool, again, tmp_path / "exported")
    assert losses_of(tmp_path) == losses_of(tmp_path / "exported")
