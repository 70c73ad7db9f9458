"""tools/prepare_data.py as a user types it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from imdm_scale.config.prepare_cli import parse_prepare_arguments
from imdm_scale.data import prepare as preparing
from imdm_scale.data.detokenizers import DETOKENIZERS
from imdm_scale.data.manifest import FILE_NAME, Manifest
from imdm_scale.data.prepare import PrepareOptions, Progress
from imdm_scale.data.prepare_console import PreparationReport, duration
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.data.tokenizer_training import train_sentencepiece
from tests.end_to_end.test_train import ROOT, typed
from tools.prepare_data import main

TOOL = "tools/prepare_data.py"
COMMANDS = ("prepare", "train-tokenizer", "verify", "stats")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leaves the user's cache of `datasets` alone, in this process and in those that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [
        f"It was the {number}th night, and the wind had fallen in the old wood." for number in range(400)
    ]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


@pytest.fixture(scope="module")
def prepared(text: Path) -> Path:
    """Blocks of 64 tokens, by two processes."""
    folder = text.parent / "prepared"
    words = ("prepare", "--source", str(text), "--out", str(folder), "--length", "64", "--workers", "2")
    done = typed(TOOL, *words)
    assert done.returncode == 0, done.stderr
    for shown in ("train  396/396 documents", "valid  4/4 documents", "tokens dropped", "tokens a second"):
        assert shown in done.stdout
    assert f"data.path={folder} model.length=64" in done.stdout
    return folder


def test_prepare_then_verify_then_stats(text: Path, prepared: Path) -> None:
    manifest = Manifest.from_json((prepared / FILE_NAME).read_text(), "")
    assert manifest.length == 64 and manifest.splits["train"].num_documents == 396
    verified = typed(TOOL, "verify", str(prepared), "--samples", "2")
    assert verified.returncode == 0, verified.stderr
    assert f"All 2 shards are whole; the data's hash is {manifest.hash[:16]}." in verified.stdout
    assert verified.stdout.count("the wind had fallen") >= 2
    measured = typed(TOOL, "stats", str(prepared), "--out", str(text.parent / "plot.png"))
    assert measured.returncode == 0, measured.stderr
    assert "entropy per block" in measured.stdout
    assert (text.parent / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_damage_is_found(prepared: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", prepared, tmp_path / "damaged"], check=True)
    (tmp_path / "damaged" / "train" / "00000.npy").unlink()
    done = typed(TOOL, "verify", str(tmp_path / "damaged"))
    assert done.returncode == 1, done.stderr
    assert "damaged: " in done.stdout and "train/00000.npy is missing" in done.stdout
    assert "1 damage found in 2 shards." in done.stdout


def test_a_mistake_gets_one_sentence(tmp_path: Path) -> None:
    done = typed(TOOL, "prepare", "--source", "no/such/file.txt", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ") and "no/such/file.txt" in sentence


def test_the_same_again_does_nothing(text: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    assert run("prepare", "--source", text, "--out", prepared, "--length", 64, "--workers", 1) == 0
    assert "exactly this already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in prepared.rglob("*")} == before
    assert run("prepare", "--source", text, "--out", prepared, "--length", 32) == 2
    assert "length" in capsys.readouterr().err


def test_every_option_reaches_the_preparation(text: Path, tmp_path: Path) -> None:
    words = (
        "--text-column text --train train[:100] --valid none --length 16 --packing plain --documents-per-group 7 "
        "--no-document-eos --shard-mib 3 --shuffle-window 5 --bos </s> --eos <s> --detokenizer ptb --streaming"
    )
    assert run("prepare", "--source", text, "--out", tmp_path / "out", *words.split(), "--workers", 1) == 0
    manifest = Manifest.from_json((tmp_path / "out" / FILE_NAME).read_text(), "")
    assert list(manifest.splits) == ["train"] and manifest.splits["train"].num_documents == 100
    assert manifest.length == 16 and manifest.shuffle_window == 5
    assert manifest.options == {
        "packing": "plain",
        "documents_per_group": 7,
        "document_eos": False,
        "shard_bytes": 3 * 2**20,
    }
    assert manifest.source["detokenizer"] == "ptb" and manifest.source["train"] == "train[:100]"
    packaged = load_tokenizer(None)
    assert (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id) == (packaged.eos_id, packaged.bos_id)


def test_defaults_are_those_of_the_library(tmp_path: Path) -> None:
    arguments = parse_prepare_arguments(["prepare", "--out", str(tmp_path)])
    for option in dataclasses.fields(PrepareOptions):
        if option.name != "shard_bytes":
            assert getattr(arguments, option.name) == option.default, option.name
    assert arguments.shard_mib * 2**20 == PrepareOptions().shard_bytes


def test_train_a_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "own.model"
    words = ["--vocab-size", 150, "--model-type", "bpe", "--max-documents", 50, "--threads", 1]
    assert run("train-tokenizer", "--source", text, "--out", file, *words) == 0
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()][:50]
    assert file.read_bytes() == train_sentencepiece(documents, 150, model_type="bpe")
    printed = capsys.readouterr().out
    assert "150 pieces" in printed and "first 50 documents" in printed
    # The command that is shown next is one that works.
    (command,) = [line for line in printed.splitlines() if "--tokenizer" in line]
    following = shlex.split(command)[2:]
    assert run(*following, "--length", 32, "--workers", 1) == 0
    assert run("verify", file.with_suffix("")) == 0


def test_train_a_tokenizer_in_vain(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (("--out", tmp_path, "--vocab-size", 150), "which is a folder"),
        (("--out", tmp_path / "x.model", "--vocab-size", 20), "--vocab-size is 20"),
        (("--out", tmp_path / "x.model", "--vocab-size", 150, "--train", "none"), "--train is none"),
        (("--out", text / "x.model", "--vocab-size", 150), "cannot be written"),
    ):
        assert run("train-tokenizer", "--source", text, *words) == 2
        assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "required: COMMAND"),
        ("verfy x", "invalid choice: 'verfy'"),
        ("prepare", "required: --out"),
        ("prepare --out x --lenght 3", "--lenght is no known flag of prepare; did you mean --length?"),
        ("prepare --out x --leng 3", "did you mean --length?"),
        ("prepare --out x --length 0", "'0' is no whole number of at least 1"),
        ("prepare --out x --packing wrap", "invalid choice: 'wrap'"),
        ("prepare --out no/such/folder --length 2", "length is 2, but must be at least 3"),
        ("stats x --out plot.txt", "'plot.txt' does not end in .png"),
        ("stats x y", "stats has no use for the word 'y'"),
        ("verify no/such/folder", "no/such/folder/manifest.json cannot be read"),
    ],
)
def test_mistakes(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and sentence in captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_and_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    examples = [
        line.strip() for line in printed.splitlines() if line.startswith("  python tools/prepare_data.py")
    ]
    assert any(f" {command} " in example for example in examples)
    for example in examples:
        parse_prepare_arguments(shlex.split(example)[2:])
    if command == "prepare":
        assert all(name in printed for name in DETOKENIZERS)


def test_every_command_of_the_documentation_is_one() -> None:
    text = (ROOT / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = [
        line.strip("$ ") for line in text.splitlines() if re.match(r"[$ ]+python tools/prepare_data.py", line)
    ]
    assert {command.split()[2] for command in commands} == set(COMMANDS)
    for command in commands:
        parse_prepare_arguments(shlex.split(command)[2:])
    sources = re.findall(r"`(?:prepare )?(--source [^`]*)`", text)
    assert len(sources) > 8
    for source in sources:
        parse_prepare_arguments(["prepare", "--out", "x", *shlex.split(source)])


def test_help_and_mistakes_load_no_heavy_library() -> None:
    program = (
        "import sys, contextlib\n"
        "from tools.prepare_data import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['prepare', '--help'])\n"
        "assert main(['prepare', '--lenght', '3', '--out', 'x']) == 2\n"
        "print({'torch', 'transformers', 'datasets', 'tokenizers', 'matplotlib', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


def test_an_interrupt_ends_with_a_word(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while documents are packed; then the same command finishes what was begun."""
    words = ("prepare", "--source", text, "--out", tmp_path / "out", "--length", 64, "--workers", 1)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "pack", interrupted)
        assert run(*words) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here.\n"
    assert run(*words) == 0
    assert run("verify", tmp_path / "out") == 0


def test_progress_in_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console, clock = Console(width=40), Clock()
    monkeypatch.setattr("time.monotonic", clock)
    with console.capture() as capture, PreparationReport(console) as report:
        for documents in range(0, 101, 10):
            clock.now += 4
            report.show(Progress("train", documents, 100, 1000 * documents, documents, clock.now, 0))
        report.show(Progress("train", 100, 100, 100_000, 100, clock.now, 0))
    opening, *lines = capture.get().splitlines()
    assert opening.startswith("opening the source")
    assert [line.split()[1] for line in lines] == ["20/100", "50/100", "80/100", "100/100"]
    assert lines[0].endswith("0.002 M tokens/s  0:00:48 left")
    assert lines[-1].endswith("in 0:00:44")
    assert report.rates == {"train": 100_000 / 44}


def test_progress_of_a_stream_that_does_not_tell_its_length_and_of_a_resumed_one() -> None:
    console = Console(width=120, force_terminal=True)
    with console.capture() as capture, PreparationReport(console) as report:
        report.show(Progress("train", 50, None, 60_000, 9, 2.0, 20_000))
    assert "50 documents  9 blocks  0.020 M tokens/s" in capture.get() and "left" not in capture.get()
    assert report.rates == {"train": 20_000}


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


class Clock:
    """Time that stands still unless told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(*words: object) -> int:
    return main([str(word) for word in words])
