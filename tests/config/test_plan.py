"""tools/plan.py, and the table that it and a run print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from imdm_scale.config.layout import RoleLayout, RunLayout
from imdm_scale.config.layout_table import layout_table
from tools.plan import main

ROOT = Path(__file__).resolve().parents[2]


def shown(layout: RunLayout) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(layout_table(layout))
    return capture.get().splitlines()


def rows(lines: list[str], edge: str = "│") -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip(edge).split(edge)] for line in lines if line.startswith(edge)
    ]


def headings(lines: list[str]) -> list[list[str]]:
    return rows(lines, "┃")


def role(name: str, ranks: range | list[int], tp: int = 1, pp: int = 1) -> RoleLayout:
    return RoleLayout(name, tuple(ranks), tp, pp, tp > 1, 3, 4)


def test_a_row_for_every_rank() -> None:
    layout = RunLayout(3, "disaggregated", role("student", [0, 2], tp=2), role("teacher", [1]))
    lines = shown(layout)
    assert lines[0].strip() == "3 processes, student and teacher disaggregated"
    assert headings(lines) == [
        ["", "student", "teacher"],
        ["", "tp 2 x pp 1 x dp 1, ZeRO-3", "tp 1 x pp 1 x dp 1, ZeRO-3"],
        ["ranks", "micro-batch 4, sequence parallel", "micro-batch 4"],
    ]
    assert rows(lines) == [
        ["0", "stage 0, replica 0, shard 0", ""],
        ["1", "", "stage 0, replica 0, shard 0"],
        ["2", "stage 0, replica 0, shard 1", ""],
    ]


def test_ranks_of_the_same_stages_share_a_row_of_a_large_world() -> None:
    layout = RunLayout(1024, "colocated", role("student", range(1024), 8, 2), role("teacher", range(1024), 4))
    assert rows(shown(layout)) == [
        ["0-511", "stage 0, replicas 0-63, shards 0-7", "stage 0, replicas 0-127, shards 0-3"],
        ["512-1023", "stage 1, replicas 0-63, shards 0-7", "stage 0, replicas 128-255, shards 0-3"],
    ]
    every_eighth = [rank for rank in range(64) if rank % 8 == 7]
    others = [rank for rank in range(64) if rank % 8 != 7]
    layout = RunLayout(64, "disaggregated", role("student", others), role("teacher", every_eighth))
    assert rows(shown(layout)) == [
        ["0-6, 8-14, 16-22, ..., 56-62 (56 in all)", "stage 0, replicas 0-55, shard 0", ""],
        ["7, 15, 23, ..., 63 (8 in all)", "", "stage 0, replicas 0-7, shard 0"],
    ]


def test_one_role() -> None:
    assert rows(shown(RunLayout(1, "colocated", role("student", [0]), None))) == [
        ["0", "stage 0, replica 0, shard 0"]
    ]


def test_layout_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "layout --world-size 4 teacher.placement=disaggregated parallel.student.tp=2 parallel.teacher.pp=2"
    )
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "4 processes, student and teacher disaggregated" in printed
    assert headings(printed.splitlines()) == [
        ["", "student", "teacher"],
        ["", "tp 2 x pp 1 x dp 1, ZeRO-3", "tp 1 x pp 2 x dp 1, ZeRO-3"],
        ["ranks", "micro-batch 16", "micro-batch 16"],
    ]


def test_zero_stage_and_recipe_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout", "--world-size", "2", "--ds_config", str(ROOT / "configs" / "ds" / "zero1.json")]
    assert main([*words, "--recipe", str(ROOT / "configs" / "recipes" / "pretrain_tiny.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "tp 1 x pp 1 x dp 2, ZeRO-1" in printed and "teacher" not in printed


def test_no_file_of_the_run_need_exist() -> None:
    words = "layout --world-size 512 model.size=70b data.path=/no/such parallel.student.tp=8 parallel.student.pp=8"
    assert main([*words.split(), "train.micro_batch_size=1", "train.global_batch_size=1024"]) == 0


def test_an_impossible_layout_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "--world-size", "8", "parallel.student.tp=3"]) == 2
    captured = capsys.readouterr()
    sentence, heading, *near = captured.err.splitlines()
    assert captured.out == ""
    assert sentence.startswith(
        "error: parallel.student.tp is 3, which does not divide the 8 attention heads; "
    )
    assert heading == "possible, nearest first:"
    assert near[0] == "  parallel.student.tp=4 parallel.student.pp=1" and len(near) == 8
    for words in near:
        assert main(["layout", "--world-size", "8", "train.global_batch_size=128", *words.split()]) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("layout", "--world-size"),
        ("layout --world-size 0", "'0' is no number of processes"),
        ("layout --world-size 2 --tp 2", "--tp is no known flag"),
        ("layout --world-size 2 --train.micro_batch_size=2", "write it without dashes"),
        ("layout --world-size 2 parallel.student.tpp=2", "did you mean parallel.student.tp"),
        ("layout --world-size 3", "train.global_batch_size is 32, which is no multiple of"),
        ("layouts --world-size 3", "invalid choice: 'layouts'"),
        ("", "COMMAND"),
    ],
)
def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    assert main(words.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and sentence in errors and errors.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in ((["--help"], "layout"), (["layout", "--help"], "parallel.student.tp  int  1")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert told in capsys.readouterr().out


def test_no_heavy_library_is_imported() -> None:
    code = (
        "import sys; from tools.plan import main; main(['layout', '--world-size', '2']);"
        "print(sorted({'torch', 'deepspeed', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
