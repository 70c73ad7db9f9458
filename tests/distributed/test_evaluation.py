"""Evaluations over ranks: the same samples and figures for every layout, also after an interruption.

L positions, S samples.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imdm_scale.config.evaluate_cli import parse_evaluate_arguments
from imdm_scale.data.synthetic_source import id_tokenizer
from imdm_scale.data.tokenizer import Tokenizer, load_tokenizer
from imdm_scale.distill.bounds import bounds
from imdm_scale.distill.evaluation import open_evaluation
from imdm_scale.distill.generation import generate
from imdm_scale.errors import UserError
from imdm_scale.hf.export import config_from_architecture, save_folder
from tests.distributed.pool import RankPool
from tests.small_tokenizers import embedded_texts
from tests.tiny import plain_network, tiny

TASK = "synthetic://all_equal?vocab_size=6&train=400&valid=40"


def evaluate(words: list[str]) -> str | None:
    """What tools/evaluate.py does on a rank; the sentence of a mistake."""
    try:
        arguments = parse_evaluate_arguments(words)
        with open_evaluation(arguments, ["tools/evaluate.py", *words], torch.device("cpu")) as evaluation:
            {"generate": generate, "likelihood": bounds}[arguments.command](evaluation, arguments)
    except UserError as error:
        return str(error)
    return None


def export(folder: Path, tokenizer: Tokenizer, bos_id: int | None, **changes: Any) -> Path:
    """A tiny random network with a tokenizer, as a folder whose weights are several files."""
    architecture = tiny(vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_id, **changes)
    config = config_from_architecture(
        architecture,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_token_id=bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    tokenizer.save(folder.with_name("tokenizer"))
    save_folder(
        plain_network(architecture).state_dict(),
        config,
        folder,
        sorted(folder.with_name("tokenizer").iterdir()),
        max_shard_size="100KB",
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the packaged tokenizer's ids."""
    tokenizer = load_tokenizer(None)
    return export(tmp_path_factory.mktemp("text") / "model", tokenizer, tokenizer.bos_id)


@pytest.fixture(scope="module")
def task_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a synthetic task's ids, which texts begin with none of."""
    return export(tmp_path_factory.mktemp("task") / "model", id_tokenizer(6), None, length=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little real text."""
    folder = tmp_path_factory.mktemp("data")
    texts = [text[:4000] for text in embedded_texts("valid", 8)]
    (folder / "train.txt").write_text("\n".join(texts[:6]))
    (folder / "valid.txt").write_text("\n".join(texts[6:]))
    return folder


def words_of(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    words = ("--data", str(data), "--steps", "1", "3", "--temperatures", "0.5", "1", "--batch-size", "2")
    return ["generate", "--model", str(model), "--out", str(out), *words, *more]


@pytest.fixture(scope="module")
def alone(pool: RankPool, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation by one rank."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert pool.run(evaluate, 1, words=words_of(model, data, out, "--num-samples", "19")) == [None]
    return out


def files(out: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob(pattern))}


def scores(out: Path) -> dict[str, Any]:
    return json.loads((out / "scores.json").read_text())


def test_what_is_kept(alone: Path) -> None:
    record = json.loads((alone / "evaluation.json").read_text())
    assert record["settings"]["sampling"] == {"seed": 42, "sampler": "ancestral"}
    assert len(record["settings"]["model"]["weights"]) == 64
    (invocation,) = record["invocations"]
    assert invocation["command"].startswith("python tools/evaluate.py generate --model")
    assert invocation["versions"]["torch"] == torch.__version__
    (kept,) = scores(alone).values()
    assert kept["cells"].keys() == record["cells"].keys() and len(kept["cells"]) == 4
    assert all(cell["num_samples"] == 19 for cell in [*kept["cells"].values(), kept["data"]])
    assert kept["frontier"]["1"]["data_entropy"] == kept["data"]["entropy"]["value"]
    ids_SL = np.load(alone / "samples" / "steps-0003_temperature-0.5.npy")
    assert ids_SL.shape == (19, 16) and ids_SL.dtype == np.uint16
    assert (ids_SL[:, 0] == load_tokenizer(None).bos_id).all()


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(2, ("--zero", "3")), (4, ("--tp", "2", "--pp", "2"))],
    ids=["dp 2, ZeRO-3", "tp 2, pp 2"],
)
def test_interrupted_and_over_other_ranks(
    pool: RankPool,
    model: Path,
    data: Path,
    alone: Path,
    tmp_path: Path,
    world_size: int,
    flags: tuple[str, ...],
) -> None:
    """One rank was interrupted in its second cell; others go on."""
    out = tmp_path / "out"
    shutil.copytree(alone / "data", out / "data")
    for name in ("evaluation.json", "samples"):
        copy = shutil.copytree if (alone / name).is_dir() else shutil.copyfile
        copy(alone / name, out / name)
    cells = sorted((out / "samples").iterdir())
    np.save(cells[1], np.load(cells[1])[:6])
    for cell in cells[2:]:
        cell.unlink()
    words = words_of(model, data, out, "--num-samples", "19", *flags)
    assert pool.run(evaluate, world_size, words=words) == [None] * world_size
    expected, found = files(alone, "samples/*"), files(out, "samples/*")
    assert found.keys() == expected.keys()
    if "--tp" not in flags:
        assert found == expected
        assert scores(out).keys() == scores(alone).keys()
        for judge, kept in scores(alone).items():
            assert (
                scores(out)[judge]["cells"] == kept["cells"]
                and scores(out)[judge]["frontier"] == kept["frontier"]
            )
        record = json.loads((out / "evaluation.json").read_text())
        drawn = [record["cells"][cell.stem]["invocations"] for cell in cells]
        assert drawn == [[0], [0, 1], [0, 1], [0, 1]]
    for cell in cells:
        # Over tensor-parallel ranks a draw may fall on the other side of a border.
        theirs, ours = np.load(cell), np.load(alone / "samples" / cell.name)
        assert (theirs != ours).any(axis=1).sum() <= 1


def test_more_samples_and_another_judge_draw_only_what_is_missing(
    pool: RankPool, model: Path, data: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    words = words_of(model, data, out, "--num-samples", "15", "--data-tokens", "1000")
    assert pool.run(evaluate, 1, words=words) == [None]
    assert files(out, "samples/*") == files(alone, "samples/*"), "another judge: nothing is drawn"
    assert len(scores(out)) == 2
    words = words_of(model, data, out, "--num-samples", "21")
    assert pool.run(evaluate, 1, words=words) == [None]
    for cell in sorted((out / "samples").iterdir()):
        assert (np.load(cell)[:19] == np.load(alone / "samples" / cell.name)).all() and len(
            np.load(cell)
        ) == 21


def test_continuations(pool: RankPool, model: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--prefixes", "3", "--prefix-length", "5", "--continuations", "2", "--text-length", "12")
    assert pool.run(evaluate, 1, words=words_of(model, data, tmp_path / "out", *flags)) == [None]
    (folder,) = (tmp_path / "out" / "data").iterdir()
    (shard,) = (folder / "valid").iterdir()
    beginnings = np.load(shard)[:3, :5].repeat(2, axis=0)
    for cell in (tmp_path / "out" / "samples").iterdir():
        ids_SL = np.load(cell)
        assert ids_SL.shape == (6, 16) and (ids_SL[:, :5] == beginnings).all()
        assert (ids_SL[0] != ids_SL[1]).any(), "two continuations of one beginning"
    (kept,) = scores(tmp_path / "out").values()
    assert kept["text_length"] == 12
    assert all(cell["targets"] <= 6 * 11 for cell in kept["cells"].values())


def test_a_synthetic_task(pool: RankPool, task_model: Path, tmp_path: Path) -> None:
    words = ["generate", "--model", str(task_model), "--data", TASK, "--steps", "2", "--num-samples", "50"]
    assert pool.run(evaluate, 1, words=[*words, "--out", str(tmp_path / "out")]) == [None]
    (kept,) = scores(tmp_path / "out").values()
    task = kept["cells"]["steps-0002_temperature-1"]["task"]
    ids_SL = np.load(tmp_path / "out" / "samples" / "steps-0002_temperature-1.npy")
    assert task["possible"]["value"] == ((ids_SL == ids_SL[:, :1]).all(axis=1) & (ids_SL[:, 0] < 6)).mean()
    assert 0 <= task["possible"]["low"] <= task["possible"]["value"] <= task["possible"]["high"]
    assert task["of_task"]["exact_total_correlation"] == pytest.approx(3 * np.log(6))
    assert task["factorisation_error"] is None, "impossible samples make it infinite"


def test_bounds(pool: RankPool, model: Path, data: Path, tmp_path: Path) -> None:
    """Two ranks, then one that goes on after the first draw; a file is a corpus as a whole."""
    whole = tmp_path / "whole.txt"
    whole.write_text("\n".join(embedded_texts("valid", 2))[:3000])
    words = [
        "likelihood",
        "--model",
        str(model),
        "--draws",
        "3",
        "--batch-size",
        "4",
        "--data",
        str(data),
        str(whole),
    ]
    assert pool.run(evaluate, 2, words=[*words, "--out", str(tmp_path / "two")]) == [None] * 2
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    (tmp_path / "one" / "likelihood.json").unlink()
    for draws in (tmp_path / "one" / "likelihood").iterdir():
        np.save(draws, np.load(draws)[:1])
    assert pool.run(evaluate, 1, words=[*words, "--out", str(tmp_path / "one")]) == [None]
    two, one = (json.loads((tmp_path / name / "likelihood.json").read_text()) for name in ("two", "one"))
    assert two.keys() == one.keys() == {str(data), str(whole)}
    for name, found in two.items():
        assert found["nelbo"] == pytest.approx(one[name]["nelbo"], rel=1e-6)
        assert found["standard_error"] == pytest.approx(one[name]["standard_error"], rel=1e-4)
        assert found["num_draws"] == 3 and found["nelbo"] > 0
    tokens = len(load_tokenizer(None).encode(whole.read_text()))
    assert two[str(whole)]["num_sequences"] * 14 == pytest.approx(tokens, abs=40), "all of it"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", "7"), "whose seed is 42, but seed is now 7; give another --out"),
        (("--dtype", "bf16"), "whose dtype is fp32, but dtype is now bf16"),
        (("--tp", "3"), "--tp is 3, which does not divide the 4 attention heads"),
        (("--tp", "2"), "does not divide the 1 process; start 2"),
        (("--sampler", "coupled_argmax"), "takes the likeliest tokens at any temperature"),
        (("--prefix-length", "5"), "no --prefixes are asked for"),
        (("--prefixes", "2", "--prefix-length", "20"), "at most the model's 16 tokens"),
        (("--prefixes", "900", "--prefix-length", "2", "--text-length", "9"), "validation split of"),
        (("--mauve",), "needs the package mauve-text"),
        (("--data", "/no/such/folder"), "/no/such/folder"),
        (("--data", TASK), "mean different words"),
    ],
)
def test_refused(
    pool: RankPool, model: Path, data: Path, alone: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (sentence,) = pool.run(evaluate, 1, words=words_of(model, data, out, *flags))
    assert sentence is not None and said in sentence and "\n" not in sentence
    assert files(out, "samples/*") == files(alone, "samples/*")


def test_books_mean_nothing_to_a_task(pool: RankPool, task_model: Path, tmp_path: Path) -> None:
    (sentence,) = pool.run(
        evaluate, 1, words=["generate", "--model", str(task_model), "--out", str(tmp_path / "out")]
    )
    assert sentence is not None and "are no words" in sentence and "--data synthetic://" in sentence
