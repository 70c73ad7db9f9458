"""A checkpoint that cannot be written ends the run with one sentence, and what was saved before stays; a resume that
does not fit is refused; damaged checkpoints are passed over aloud.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imdm_scale.checkpoint.verify import name_of, newest_whole
from imdm_scale.config.model_folder import CHECKPOINTS
from imdm_scale.parallel.process import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE
from tests.distributed.killing import launch
from tests.distributed.layouts import micro_batches, student
from tests.distributed.pool import Ended, RankPool
from tests.distributed.product import Run, losses_of, train_product, write_teacher

RUN = Run(
    (*student(), *micro_batches(2), "train.max_steps=6", "train.save_every=2", "method.steps_per_round=2"),
    1,
    2,
)
ONE_TEACHER = "method.steps_per_round=10"
"""No teacher is exported on the way."""
REFUSED = [USER_ERROR_EXIT_CODE, FAILURE_EXIT_CODE]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that a process without privileges can read."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        write_teacher(Path(scratch))
        yield Path(scratch)


def fill_the_disk(folder: Path) -> None:
    """A limit on the size of files: a shard of the second rank, and anything larger, does not fit any more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def protect(folder: Path) -> None:
    """The folder of checkpoints is not for this user to write."""
    os.chmod(folder / "run" / CHECKPOINTS, 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


def train_with_a_fault(config: Any, stage: int, fault: Callable[[Path], None], folder: Path) -> None:
    """The training program; after its third update something happens to the disk."""
    from imdm_scale.parallel.process import end_process_group, failures_reported, start_process_group

    with failures_reported():
        start_process_group()
        import imdm_scale.distill.console as console

        show = console.ProgressReport.show

        def shown(self: Any, update: Any) -> None:
            show(self, update)
            if update.step == 3:
                wait_for_the_first(folder)
                fault(folder)

        console.ProgressReport.show = shown  # type: ignore[method-assign]
        train_product(config, stage)
        end_process_group()


def wait_for_the_first(folder: Path) -> None:
    """The checkpoint after update 2 is written in the background; the fault must come after it."""
    while not (folder / "run" / CHECKPOINTS / "latest").exists():
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(fill_the_disk, "File too large"), (protect, "Permission denied")],
    ids=["full disk", "read-only folder"],
)
def test_a_failed_save_is_loud_and_loses_nothing(
    pool: RankPool, folder: Path, fault: Callable[[Path], None], words: str
) -> None:
    ended = pool.launch(
        train_with_a_fault,
        RUN.world_size,
        config=RUN.config(folder, ONE_TEACHER),
        stage=RUN.stage,
        fault=fault,
        folder=folder,
    )
    errors = [line for line in ended.output.splitlines() if "error: " in line]
    assert len(errors) == 1 and words in errors[0] and "go on with resume=latest" in errors[0], ended.output
    assert "Traceback" not in ended.output
    assert sorted(ended.exit_codes, reverse=True) in (REFUSED, [USER_ERROR_EXIT_CODE] * 2)
    os.chmod(folder / "run" / CHECKPOINTS, 0o755)
    assert newest_whole(folder / "run")[1].step == 2
    assert launch(pool, RUN, folder, None, ONE_TEACHER).exit_codes == [0, 0]
    assert list(losses_of(folder)) == [1, 2, 3, 4, 5, 6]


def errors_of(ended: Ended) -> str:
    """The one sentence of a refused start."""
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in ended.output, ended.output
    assert USER_ERROR_EXIT_CODE in ended.exit_codes and 0 not in ended.exit_codes
    return errors[0]


def test_what_a_run_goes_on_from(pool: RankPool, folder: Path) -> None:
    """One run, and all that can be wrong with going on from it."""
    pool.run(train_product, RUN.world_size, config=RUN.config(folder), stage=RUN.stage)
    root = folder / "run" / CHECKPOINTS
    assert sorted(path.name for path in root.iterdir()) == ["latest", name_of(6)], "keep_last is 1"
    kept = shutil.copytree(root / name_of(6), root / name_of(4))  # a second one, for the damage below
    (kept / "manifest.json").write_text((kept / "manifest.json").read_text()[:-40])

    for words, sentence in {
        ("seed=2",): "seed is 2, but 1 in",
        ("train.global_batch_size=16",): "train.global_batch_size is 16, but 8 in",
        ("method.steps_per_round=3",): "method.steps_per_round is 3, but 2 in",
        ("model.noise_dim=7",): "noise_dim is 7, but 6 in",
        (
            f"resume={folder / 'run'}",
            f"run_dir={folder / 'other'}",
            "data.path=synthetic://all_equal?vocab_size=95&train=32&valid=8",
        ): "counts 48 samples of data",
        (f"resume={folder / 'teacher'}",): "holds no checkpoint",
        (f"resume={folder / 'nowhere'}",): "which does not exist",
    }.items():
        assert sentence in errors_of(launch(pool, RUN, folder, None, *words)), words

    shard = root / name_of(6) / "student-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    sentence = errors_of(launch(pool, RUN, folder, None))
    assert "no checkpoint of" in sentence and f"{shard.name} has {len(content) - 1} bytes" in sentence
    shard.write_bytes(content)

    changed = launch(pool, RUN, folder, None, "train.max_steps=8", "train.learning_rate=5e-4", "log.every=1")
    assert changed.exit_codes == [0, 0], changed.output
    assert "goes on after update 6" in changed.output
    assert "changed since then: train.learning_rate 0.001 -> 0.0005" in changed.output
    assert "changed since then: train.max_steps 6 -> 8" in changed.output
    assert "train.save_every" not in changed.output
    assert list(losses_of(folder)) == [1, 2, 3, 4, 5, 6, 7, 8]
    finished = launch(pool, RUN, folder, None, "train.max_steps=8", "train.learning_rate=5e-4")
    assert finished.exit_codes == [0, 0], finished.output
