"""Pairs of a synthetic teacher, made as a user types it, killed and shared; then the student that learns from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imdm_scale.data.pairs import unpack_pairs
from imdm_scale.hf.export import load_folder, save_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from tests.data_pipeline.prepared import open_folder
from tests.end_to_end.test_train import ROOT, typed

TASK = "synthetic://all_equal?vocab_size=32&train=500&valid=50"
TRAIN = ("tools/train.py", "--ds_config", "configs/ds/zero1.json", "--recipe")
SHAPE = ("--num-pairs", "50", "--steps", "4", "--shard-pairs", "16", "--batch-size", "8")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a few updates."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    words = ("train.max_steps=2", "train.warmup_steps=1", "evaluate.num_samples=8", "evaluate.steps=[1,4]")
    done = typed(
        *TRAIN, "configs/recipes/synthetic_teacher.yaml", f"run_dir={run_dir}", f"data.path={TASK}", *words
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir / "student"


def generation(teacher: Path, out: Path, *more: str) -> tuple[str, ...]:
    """The command."""
    flags = ("--model", str(teacher), "--data", TASK, "--out", str(out), *SHAPE)
    return ("tools/generate_pairs.py", *flags, *more)


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty pairs, by one process."""
    out = tmp_path_factory.mktemp("pairs") / "pairs"
    done = typed(*generation(teacher, out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50/50" in done.stdout and "pairs/s" in done.stdout and "50 pairs written to" in done.stdout
    return out


def shards(out: Path) -> dict[str, bytes]:
    """The bytes of everything that is trained on."""
    files = [out / "manifest.json", *sorted((out / "train").glob("*.npy"))]
    return {file.name: file.read_bytes() for file in files}


def test_pairs_are_all_there(pairs: Path) -> None:
    folder = open_folder(pairs)
    found = [unpack_pairs(folder.open_shard(shard)) for shard in folder.manifest.splits["train"].shards]
    assert [len(part.t_B) for part in found] == [16, 16, 16, 2]
    assert [number for part in found for number in part.numbers_B] == list(range(50))
    assert folder.manifest.options["steps"] == 4 and folder.manifest.source["data"] == TASK
    done = typed("tools/prepare_data.py", "verify", str(pairs))
    assert done.returncode == 0 and "pairs of 8 tokens, sampled in 4 steps" in done.stdout, done.stdout
    done = typed("tools/prepare_data.py", "stats", str(pairs))
    assert done.returncode == 2 and "holds pairs, of which there are no statistics" in done.stderr


def test_parts_and_ranks_make_the_same_folder(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """As the tasks of an array do; the first by two ranks, and the second by Slurm's own numbers."""
    out = tmp_path / "pairs"
    first = typed(*generation(teacher, out, "--part", "0", "--parts", "2"), processes=2)
    assert first.returncode == 0 and "2 of 4 shards are other parts'" in first.stdout
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"}
    environment = {**os.environ, **array, "SLURM_ARRAY_TASK_STEP": "3"}
    second = subprocess.run(
        [sys.executable, *generation(teacher, out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert second.returncode == 0 and "50 pairs written to" in second.stdout
    assert shards(out) == shards(pairs)
    again = typed(*generation(teacher, out))
    assert again.returncode == 0 and "holds these 50 pairs already" in again.stdout


def test_killed_it_goes_on(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    command = [sys.executable, *generation(teacher, out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list((out / "train").glob("*.npy")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = typed(*command[1:])
    assert done.returncode == 0, done.stderr
    assert shards(out) == shards(pairs)


def test_the_student_learns_from_them(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    words = (
        f"run_dir={tmp_path / 'run'}",
        f"data.path={pairs}",
        f"train.init_from={teacher}",
        "train.max_steps=3",
        "train.micro_batch_size=8",
        "train.global_batch_size=16",
        "log.diagnose_every=3",
        "evaluate.num_samples=8",
        "evaluate.batch_size=4",
        "evaluate.steps=[1,4]",
    )
    done = typed(*TRAIN, "configs/recipes/synthetic_im_redi.yaml", *words, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 pairs of 8 tokens" in done.stdout
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [update["network_evaluations"] for update in updates] == [16, 32, 48]
    assert updates[2]["diagnostics"]["noise_information"] >= 0
    student = load_folder(tmp_path / "run" / "student")
    assert (student.config.sampler, student.config.bos_token_id) == ("ancestral", None)
    assert torch.equal(student.generate_text(4, 2, seed=1), student.generate_text(4, 2, seed=1))


def refused(*words: str) -> str:
    """The one sentence of a command that must not start."""
    done = typed(*words)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def test_what_does_not_fit_is_refused(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    redi = (
        *TRAIN,
        "configs/recipes/synthetic_im_redi.yaml",
        f"run_dir={tmp_path}",
        f"train.init_from={teacher}",
    )
    text = pairs / "data"
    assert "holds text, but method.name is im_redi" in refused(*redi, f"data.path={next(text.iterdir())}")
    assert "have 8 tokens; set model.length=8" in refused(*redi, f"data.path={pairs}", "model.length=9")
    plain = (*TRAIN, "configs/recipes/synthetic_teacher.yaml", f"run_dir={tmp_path}")
    assert "holds pairs of states and texts, but method.name is pretrain" in refused(
        *plain, f"data.path={pairs}"
    )
    sentence = refused(*generation(teacher, pairs, "--seed", "5"))
    assert "prepared with seed 1, but seed is now 5" in sentence
    assert "in (0, 1]" in refused(*generation(teacher, tmp_path, "--t-min", "1.5"))
    assert "the last is 1" in refused(*generation(teacher, tmp_path, "--part", "2", "--parts", "2"))
    config = load_folder(teacher).config
    config.noise_dim, config.sampler = 2, "coupled"
    files = teacher.glob("tokenizer*")
    coupled = save_folder(ImdmForMaskedLM(config), config, tmp_path / "coupled", files)
    assert "trained to be sampled as coupled" in refused(*generation(coupled, tmp_path / "out"))
