"""The command lines as a user types them, at a size that takes seconds: the quickstart, sampling, mistakes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from imdm_scale.assets import TOKENIZER

ROOT = Path(__file__).resolve().parents[2]
ZERO3 = "configs/ds/zero3.json"
SMALL = (
    "train.max_steps=4",
    "method.steps_per_round=2",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.save_every=3",
    "log.every=1",
    "evaluate.steps=[1,4]",
    "evaluate.num_samples=6",
    "evaluate.batch_size=4",
)


def typed(
    *words: str, processes: int | None = None, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a command printed. `processes` starts them with the deepspeed launcher."""
    launcher = [sys.executable]
    if processes is not None:
        # The launcher takes a number of GPUs even where there are none, and a port that no other test holds.
        launcher = [
            "deepspeed",
            "--num_gpus",
            str(processes),
            "--master_port",
            str(20000 + os.getpid() % 20000),
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *words], cwd=ROOT, capture_output=True, text=True, env=environment, preexec_fn=before
    )


def refused(*words: str) -> str:
    """The one sentence of a run that must not start."""
    done = typed("tools/train.py", *words)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quickstart at a small size on two processes: its folder and what it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    done = typed("tools/train.py", "--ds_config", ZERO3, f"run_dir={run_dir}", *SMALL, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done.stdout


def test_what_a_run_writes(finished_run: tuple[Path, str]) -> None:
    run_dir, printed = finished_run
    updates = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [update["step"] for update in updates] == [1, 2, 3, 4]
    assert {"step", "loss", "grad_norm", "tokens", "seconds"} <= updates[0].keys()
    assert [update["teacher_steps"] for update in updates] == [16, 16, 8, 8]
    assert updates[-1]["tokens"] == 4 * 8 * 64
    quality = json.loads((run_dir / "quality.json").read_text())
    assert all(quality[role].keys() == {"1", "4"} for role in ("teacher", "student"))
    assert all(cell.keys() == {"perplexity", "entropy"} for cell in quality["student"].values())
    assert quality["data"].keys() == {"perplexity", "entropy"}
    assert [update["student_steps"] for update in updates] == [8, 8, 4, 4]
    assert [update["network_evaluations"] for update in updates] == [24, 48, 72, 96]
    assert updates[0]["diagnostics"]["noise_information"] == pytest.approx(0, abs=1e-9), (
        "before the first update"
    )
    assert not any("diagnostics" in update for update in updates[1:])
    files = (
        "student/config.json",
        "checkpoints/step-00000003/manifest.json",
        "checkpoints/step-00000004/student-00001.safetensors",
        "teachers/round-01/config.json",
    )
    for name in ("quality.png", *files):
        assert (run_dir / name).stat().st_size > 0
    assert list((run_dir / "wandb").glob("offline-run-*"))
    for words in ("im_sdtt", "5.59 M parameters", "2 processes on cpu", "4/4", "Quality by sampling steps"):
        assert words in printed


def test_the_student_writes_text(finished_run: tuple[Path, str]) -> None:
    run_dir, _ = finished_run
    words = ("tools/sample.py", "--model", str(run_dir / "student"), "--steps", "4", "--num-samples", "2")
    first, again = typed(*words, "--prompt", "It was a"), typed(*words, "--prompt", "It was a")
    assert first.returncode == 0, first.stderr
    assert "[1] It was a" in first.stdout and "[2] It was a" in first.stdout
    assert first.stdout == again.stdout
    nowhere = typed("tools/sample.py", "--model", str(run_dir / "teacher"))
    assert nowhere.returncode == 2 and nowhere.stderr.startswith("error: ")


def test_a_second_run_moves_the_first_aside_and_a_full_disk_loses_nothing(
    finished_run: tuple[Path, str],
) -> None:
    """A limit on the size of files stands in for the full disk: the data fit under it, the model does not."""
    run_dir, _ = finished_run
    weights = (run_dir / "student" / "model.safetensors").read_bytes()
    limit = 9_000_000
    done = typed(
        "tools/train.py",
        *("--ds_config", ZERO3, f"run_dir={run_dir}", *SMALL, "log.wandb=off"),
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(run_dir / "teachers") in errors[0]
    aside = run_dir.with_name(f"{run_dir.name}.1")
    assert (aside / "student" / "model.safetensors").read_bytes() == weights
    assert not list(run_dir.rglob("model.safetensors"))


def test_mistakes_get_one_sentence(tmp_path: Path) -> None:
    assert "there is no" in refused("--ds_config", "configs/ds/zero4.json").lower()
    broken = tmp_path / "broken.json"
    broken.write_text('{\n "bf16": {"enabled": tru}\n}')
    assert "line 2" in refused("--ds_config", str(broken))
    assert "train.max_steps" in refused("--ds_config", ZERO3, "train.max_step=3")
    assert "model.num_heads" in refused("--ds_config", ZERO3, "model.num_heads=3")


def test_what_only_the_files_can_tell(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "which is a file" in refused("--ds_config", ZERO3, f"run_dir={tmp_path / 'file'}")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    sentence = refused("--ds_config", ZERO3, f"teacher.path={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert str(tmp_path / "config.json") in sentence


def test_token_ids_that_mean_other_words_are_refused(tmp_path: Path) -> None:
    """A tokenizer of the same size in which two words have changed places."""
    model = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZER.read_bytes())
    first, second = model.pieces[100].piece, model.pieces[200].piece
    model.pieces[100].piece, model.pieces[200].piece = second, first
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    sentence = refused("--ds_config", ZERO3, f"tokenizer.path={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert "different words" in sentence and "tokenizer.path" in sentence
    assert not (tmp_path / "run").exists()
