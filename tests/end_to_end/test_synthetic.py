"""A synthetic teacher, then a student coupled to its noise, by the recipes as a user types them, for a few updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imdm_scale.hf.export import load_folder
from tests.end_to_end.test_train import typed

RECIPES = "configs/recipes/synthetic_{}.yaml"
SHORT = (
    "data.path=synthetic://all_equal?vocab_size=32&train=2000&valid=200",
    "train.micro_batch_size=16",
    "train.global_batch_size=32",
    "train.warmup_steps=2",
    "evaluate.num_samples=32",
    "evaluate.batch_size=16",
    "evaluate.steps=[1,4]",
)


def run(recipe: str, run_dir: Path, *words: str, processes: int | None = None) -> list[dict]:
    """The metrics of a run."""
    flags = ("--ds_config", "configs/ds/zero1.json", "--recipe", RECIPES.format(recipe), f"run_dir={run_dir}")
    done = typed("tools/train.py", *flags, *SHORT, *words, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_teacher_and_coupled_student(tmp_path: Path) -> None:
    run("teacher", tmp_path / "teacher", "train.max_steps=4")
    teacher = load_folder(tmp_path / "teacher" / "student")
    assert teacher.config.bos_token_id is None and teacher.config.noise_dim == 0
    words = (
        f"teacher.path={tmp_path / 'teacher' / 'student'}",
        "train.max_steps=3",
        "log.diagnose_every=3",
        "method.trajectory_steps=2",
        "method.states=mix",
        "method.vocabulary_order=frequency",
    )
    updates = run("coupled", tmp_path / "coupled", *words, processes=2)
    # The student, two steps of the trajectory, four of the way to the states: seven of each of 32 samples.
    assert [update["network_evaluations"] for update in updates] == [7 * 32, 14 * 32, 21 * 32]
    assert updates[2]["diagnostics"]["noise_information"] > 0
    student = load_folder(tmp_path / "coupled" / "student")
    assert student.config.sampler == "coupled_argmax" and student.config.vocabulary_order == "frequency"
    assert sorted(student.vocabulary_rank.tolist()) == list(range(34))
    texts = student.generate_text(8, num_steps=1, seed=3)
    assert torch.equal(texts, student.generate_text(8, num_steps=1, seed=3))
    assert texts.shape == (8, 8) and texts.max() < 34
    drawn = student.generate_text(8, num_steps=1, seed=3, sampler="coupled")
    assert len(drawn.unique(dim=0)) > 1, "the noise differs from text to text"


def test_coupling_needs_noise(tmp_path: Path) -> None:
    flags = ("--ds_config", "configs/ds/zero1.json", "method.name=coupled", "model.noise_dim=0")
    done = typed("tools/train.py", *flags, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model.noise_dim is 0" in sentence and "set it to 2 or more" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.path=synthetic://all_equl",), "no synthetic task"),
        (("data.path=synthetic://all_equal?vocab=3",), "no parameter vocab"),
    ],
)
def test_tasks_that_are_none(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    flags = ("--ds_config", "configs/ds/zero1.json", "--recipe", RECIPES.format("teacher"))
    done = typed("tools/train.py", *flags, *words, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in sentence
