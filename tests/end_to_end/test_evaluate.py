"""tools/evaluate.py as a user types it: the packaged teacher by one process and by two, then a report of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.end_to_end.test_train import typed

TEACHER = "imdm_scale/assets/teacher"


def test_generate_and_report(tmp_path: Path) -> None:
    words = ("tools/evaluate.py", "generate", "--model", TEACHER, "--steps", "2", "--num-samples", "6")
    alone = typed(*words, "--batch-size", "4", "--out", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    assert "Kneser-Ney" in alone.stdout
    shared = typed(*words, "--batch-size", "2", "--zero", "3", "--out", str(tmp_path / "shared"), processes=2)
    assert shared.returncode == 0, shared.stdout + shared.stderr
    ids = [
        np.load(tmp_path / name / "samples" / "steps-0002_temperature-1.npy") for name in ("alone", "shared")
    ]
    assert (ids[0] == ids[1]).all()
    record = json.loads((tmp_path / "shared" / "evaluation.json").read_text())
    assert record["invocations"][0]["command"].startswith("deepspeed --num_gpus 2 tools/evaluate.py generate")

    report = typed(
        "tools/evaluate.py",
        "report",
        str(tmp_path / "alone"),
        str(tmp_path / "shared"),
        "--out",
        str(tmp_path / "r"),
    )
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Kneser-Ney" in page and "deepspeed --num_gpus 2" in page


def test_mistakes_get_one_sentence(tmp_path: Path) -> None:
    for words, said in (
        (("generate", "--model", str(tmp_path)), "has no config.json"),
        (("generate",), "--model"),
        (("report", str(tmp_path)), "holds neither an evaluation"),
    ):
        done = typed("tools/evaluate.py", *words)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1, done.stderr
        assert said in errors[0] and "Traceback" not in done.stderr
