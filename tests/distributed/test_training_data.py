"""What `data.path` may name: found by one rank and told to all; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from imdm_scale.assets import TOKENIZER
from imdm_scale.config.load import build_config, parse_override
from imdm_scale.data.manifest import FILE_NAME, Manifest
from imdm_scale.data.place import Place
from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.distill.training_data import find_data, open_data
from imdm_scale.errors import UserError
from tests.distributed.pool import RankPool

LENGTH = 32
MAIN = 1
"""Not 0, so that nothing relies on it."""


def opened(words: list[str], run_dir: Path) -> dict[str, Any]:
    """What this rank sees of the data, or the sentence that refuses it."""
    config = build_config([parse_override(word) for word in (f"model.length={LENGTH}", *words)])
    main_rank = MAIN % dist.get_world_size()
    try:
        found = find_data(config, main_rank)
        data = open_data(config, found, run_dir, main_rank, Console(quiet=True))
    except UserError as error:
        return {"refused": str(error)}
    return {
        "hash": data.stream.data_hash,
        "tokenizer": found.tokenizer.fingerprint,
        "first_sample": data.first_sample,
        "blocks": data.stream.batch(data.first_sample, 8)[0].tolist(),
        "valid": data.first_blocks("valid", 10 * LENGTH).tolist(),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n\n".join(f"It was the {number}th of times, it was the best of times." for number in range(300))
    )
    return path


@pytest.fixture(scope="module")
def folder(text: Path) -> Path:
    out = text.parent / "prepared"
    prepare(SourceSpec(str(text)), load_tokenizer(None), PrepareOptions(length=LENGTH), out)
    return out


def test_text_and_prepared_data_are_the_same_on_every_rank(
    pool: RankPool, text: Path, folder: Path, tmp_path: Path
) -> None:
    by_text = pool.run(opened, 2, words=[f"data.path={text}"], run_dir=tmp_path)
    by_folder = pool.run(opened, 2, words=[f"data.path={folder}"], run_dir=tmp_path)
    for rank in (*by_text, *by_folder):
        assert rank["blocks"] == by_folder[0]["blocks"] and rank["valid"] == by_folder[0]["valid"]
        assert rank["tokenizer"] == load_tokenizer(None).fingerprint
    assert (
        by_folder[0]["hash"]
        == by_folder[1]["hash"]
        == Manifest.from_json((folder / FILE_NAME).read_text(), "").hash
    )


def refusals(folder: Path, text: Path, tmp_path: Path) -> dict[str, str]:
    """By what is wrong: the words, and a part of the sentence."""
    moved = tmp_path / "moved"
    moved.mkdir()
    Place(8, 1, "0" * 64).write(moved)
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    manifest = Manifest.from_json((folder / FILE_NAME).read_text(), "")
    train_only = replace(manifest, splits={"train": manifest.splits["train"]})
    (lonely / FILE_NAME).write_text(train_only.to_json())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    other = replace(manifest, tokenizer=replace(manifest.tokenizer, fingerprint="e" * 64))
    (foreign / FILE_NAME).write_text(other.to_json())
    return {
        f"data.path={folder} model.length=64": "model.length is 64, but the data in",
        f"data.path={lonely}": "have no valid split (only train)",
        f"data.path={foreign} tokenizer.path={TOKENIZER}": "mean different words; leave tokenizer.path null",
        f"data.path=[{folder},{foreign}]": "mean different words",
        f"data.path={folder} data.continue_from={moved}": "data.continue_from counts 8 samples of data 000000000000",
    }


def test_what_does_not_fit_is_refused(pool: RankPool, folder: Path, text: Path, tmp_path: Path) -> None:
    for words, sentence in refusals(folder, text, tmp_path).items():
        (rank,) = pool.run(opened, 1, words=words.split(), run_dir=tmp_path)
        assert sentence in rank.get("refused", ""), (words, rank)


def test_going_on_from_a_place(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    words = [f"data.path={folder}", "seed=9"]
    (whole,) = pool.run(opened, 1, words=words, run_dir=tmp_path)
    Place(5, 9, whole["hash"]).write(tmp_path)
    (later,) = pool.run(opened, 1, words=[*words, f"data.continue_from={tmp_path}"], run_dir=tmp_path)
    assert later["first_sample"] == 5 and later["blocks"][:3] == whole["blocks"][5:]
