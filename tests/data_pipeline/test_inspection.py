"""Prepared folders looked into: every damage is found, and every figure is that of a plain loop."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from sentencepiece import sentencepiece_model_pb2

from imdm_scale.assets import TOKENIZER
from imdm_scale.data import inspection
from imdm_scale.data.folder import FetchSettings, PreparedFolder
from imdm_scale.data.inspection import block_entropies, split_statistics, verify
from imdm_scale.data.inspection_plot import plot_statistics
from imdm_scale.data.inspection_tables import (
    block_text,
    contents_table,
    histogram_table,
    show_samples,
    statistics_table,
)
from imdm_scale.data.manifest import FILE_NAME, Manifest, Shard
from imdm_scale.data.packing import Packing
from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.metrics import unigram_entropy

LENGTH = 32
SHARD_BYTES = 128 + 40 * LENGTH * 2
"""40 blocks."""
TEXT = [
    f"Chapter {i}. [bold]It was[/bold] a dark night, and {'the wind was in the trees ' * (i % 7 + 1)}again."
    for i in range(300)
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leaves the user's cache of `datasets` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(TEXT))
    return file


@pytest.fixture(scope="module")
def made(text: Path) -> Path:
    """Wrapped blocks of 300 short documents, in several shards."""
    options = PrepareOptions(LENGTH, shard_bytes=SHARD_BYTES)
    spec = SourceSpec(str(text), train="train[:200]", valid="train[200:]")
    prepare(spec, load_tokenizer(None), options, text.parent / "made")
    return text.parent / "made"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "folder"))


def opened(folder: Path | str) -> PreparedFolder:
    fetch = FetchSettings(Path("/nowhere"), 0)
    return PreparedFolder.open(str(folder), fetch)


def blocks_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted((folder / split).glob("*.npy"))])


def rewrite(folder: Path, file: str, edit: Callable[[np.ndarray], None]) -> None:
    """Edits a shard's blocks, and lets the manifest say what the new file is: only its content is wrong."""
    blocks = np.load(folder / file)
    edit(blocks)
    np.save(folder / file, blocks)
    content = (folder / file).read_bytes()
    text = (folder / FILE_NAME).read_text()
    (entry,) = [
        shard
        for split in Manifest.from_json(text, "").splits.values()
        for shard in split.shards
        if shard.file == file
    ]
    (folder / FILE_NAME).write_text(text.replace(entry.sha256, hashlib.sha256(content).hexdigest()))


def change_split(folder: Path, split: str, **counts: Any) -> None:
    manifest = Manifest.from_json((folder / FILE_NAME).read_text(), "")
    changed = dataclasses.replace(manifest.splits[split], **counts)
    manifest = dataclasses.replace(manifest, splits={**manifest.splits, split: changed})
    (folder / FILE_NAME).write_text(manifest.to_json())


def test_a_whole_folder(made: Path) -> None:
    folder = opened(made)
    seen: list[Shard] = []
    found = verify(folder, num_samples=7, report=seen.append)
    shards = [shard for split in folder.manifest.splits.values() for shard in split.shards]
    assert len(shards) >= 5
    assert found.damages == []
    assert seen == shards
    everything = np.concatenate([blocks_of(made, split) for split in ("train", "valid")])
    expected = np.bincount(everything.ravel(), minlength=load_tokenizer(None).vocab_size)
    assert np.array_equal(found.counts_V, expected)
    assert found.tokenizer is not None
    assert found.tokenizer.fingerprint == load_tokenizer(None).fingerprint


def test_samples_are_blocks_of_the_splits_drawn_by_the_seed(made: Path) -> None:
    folder = opened(made)
    samples = verify(folder, num_samples=30).samples
    places = [(sample.split, sample.block) for sample in samples]
    assert len(set(places)) == 30
    assert {split for split, _ in places} == {"train", "valid"}
    for sample in samples:
        assert np.array_equal(sample.ids_L, blocks_of(made, sample.split)[sample.block])
    assert [(s.split, s.block) for s in verify(folder, 30, threads=1).samples] == places
    assert [(s.split, s.block) for s in verify(folder, 30, seed=1).samples] != places
    assert verify(folder, num_samples=0).samples == []
    num_blocks = sum(split.num_blocks for split in folder.manifest.splits.values())
    assert len(verify(folder, num_samples=10**6).samples) == num_blocks


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def mask_tokens(blocks: np.ndarray) -> None:
    blocks[3, 4:6] = load_tokenizer(None).mask_id


def foreign_ids(blocks: np.ndarray) -> None:
    blocks[0, 5:8] = load_tokenizer(None).vocab_size


def no_bos(blocks: np.ndarray) -> None:
    blocks[:4, 0] = 77
    blocks[3:5, -1] = 77


DAMAGES = {
    "truncated": (lambda folder: (folder / "train/00001.npy").write_bytes(b"\x93NUMPY"), "train/00001.npy"),
    "missing": (lambda folder: (folder / "train/00002.npy").unlink(), "train/00002.npy is missing"),
    "flipped": (lambda folder: flip_a_byte(folder / "valid/00000.npy"), "valid/00000.npy"),
    "masks": (lambda folder: rewrite(folder, "train/00000.npy", mask_tokens), "holds 2 mask tokens"),
    "foreign": (
        lambda folder: rewrite(folder, "train/00003.npy", foreign_ids),
        "holds 3 ids of 4097 or more",
    ),
    "frame": (
        lambda folder: rewrite(folder, "train/00004.npy", no_bos),
        "holds 5 blocks that do not begin with BOS",
    ),
    "counts": (lambda folder: change_split(folder, "valid", num_tokens=1), "the valid split has"),
    "tokenizer": (lambda folder: other_tokenizer(folder / "tokenizer"), "tokenizer has fingerprint"),
}


def other_tokenizer(folder: Path) -> None:
    """Two words change places."""
    model = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZER.read_bytes())
    first, second = model.pieces[100].piece, model.pieces[200].piece
    model.pieces[100].piece, model.pieces[200].piece = second, first
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("name", DAMAGES)
def test_one_damage(folder: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    (sentence,) = verify(opened(folder)).damages
    assert words in sentence


def test_every_damage_is_listed(folder: Path) -> None:
    for damage, _ in DAMAGES.values():
        damage(folder)
    found = verify(opened(folder), num_samples=10**6)
    assert len(found.damages) == len(DAMAGES)
    for _, words in DAMAGES.values():
        assert sum(words in sentence for sentence in found.damages) == 1
    readable = {("train", shard) for shard in (0, 3, 4)}
    assert {("train", sample.block // 40) for sample in found.samples if sample.split == "train"} >= readable


def test_a_folder_without_its_tokenizer_is_damaged_but_counted(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    found = verify(opened(folder))
    assert len(found.damages) == 1 and "tokenizer" in found.damages[0]
    assert found.tokenizer is None and found.counts_V.sum() > 0


@pytest.mark.parametrize("packing", ["plain", "document"])
def test_other_packings_are_whole_too(text: Path, tmp_path: Path, packing: Packing) -> None:
    options = PrepareOptions(LENGTH, packing=packing)
    prepare(SourceSpec(str(text)), load_tokenizer(None), options, tmp_path / "made")
    assert verify(opened(tmp_path / "made")).damages == []
    change_split(tmp_path / "made", "train", num_documents=3, num_tokens=3)
    assert len(verify(opened(tmp_path / "made")).damages) == 1


def test_behind_a_url(made: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(made), "/inspected", recursive=True)
    fetch = FetchSettings(tmp_path / "cache", 3 * SHARD_BYTES, attempts=1)
    folder = PreparedFolder.open("memory://inspected", fetch)
    assert verify(folder).damages == []
    here, there = split_statistics(opened(made), "train"), split_statistics(folder, "train")
    assert np.array_equal(here.counts_V, there.counts_V)
    files.rm("/inspected/train/00001.npy")
    again = PreparedFolder.open(
        "memory://inspected", dataclasses.replace(fetch, cache_dir=tmp_path / "other")
    )
    (sentence,) = verify(again).damages
    assert "memory://inspected/train/00001.npy" in sentence
    files.rm("/inspected", recursive=True)


@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=st.integers(0, 4)))
def test_entropy_of_each_block_against_a_plain_loop(ids_BL: np.ndarray) -> None:
    length = ids_BL.shape[1]
    expected = [
        -sum(count / length * math.log(count / length) for count in Counter(row.tolist()).values())
        for row in ids_BL
    ]
    assert np.allclose(block_entropies(ids_BL), expected, atol=1e-12)
    assert block_entropies(ids_BL).mean() == pytest.approx(unigram_entropy(ids_BL), abs=1e-12)


@pytest.mark.parametrize("piece_tokens", [1, 7 * LENGTH, 2**20])
def test_statistics_against_a_plain_loop(
    made: Path, monkeypatch: pytest.MonkeyPatch, piece_tokens: int
) -> None:
    monkeypatch.setattr(inspection, "PIECE_TOKENS", piece_tokens)
    seen: list[Shard] = []
    folder = opened(made)
    found = split_statistics(folder, "train", report=seen.append)
    blocks = blocks_of(made, "train")
    counts = Counter(blocks.ravel().tolist())
    assert found.num_blocks == len(blocks) == folder.manifest.splits["train"].num_blocks
    assert {v: int(n) for v, n in enumerate(found.counts_V) if n} == counts
    shares = [count / blocks.size for count in counts.values()]
    assert found.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert found.block_entropy == pytest.approx(unigram_entropy(blocks))
    bins = Counter(int(entropy / inspection.ENTROPY_BIN) for entropy in block_entropies(blocks))
    assert {i: int(n) for i, n in enumerate(found.entropy_histogram) if n} == bins
    assert seen == list(folder.manifest.splits["train"].shards)


def test_a_sample_of_blocks_is_spread_over_the_split(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "SAMPLED_SHARDS", 3)
    folder = opened(made)
    seen: list[Shard] = []
    found = split_statistics(folder, "train", max_blocks=30, report=seen.append)
    shards = folder.manifest.splits["train"].shards
    assert len(shards) >= 5 and len(seen) == 3
    assert seen[0] in shards[:2] and seen[-1] in shards[-2:]
    assert abs(found.num_blocks - 30) <= 3
    assert found.counts_V.sum() == found.num_blocks * LENGTH
    assert found.block_entropy == pytest.approx(unigram_entropy(blocks_of(made, "train")), rel=0.05)
    every = split_statistics(folder, "train", max_blocks=10**6)
    assert every.num_blocks == folder.manifest.splits["train"].num_blocks


@given(st.integers(1, 50), st.integers(1, 60))
def test_evenly_spaced_numbers(size: int, count: int) -> None:
    numbers = inspection._evenly_spaced(size, count)
    assert len(numbers) == min(size, count)
    gaps = np.diff(numbers)
    assert numbers[0] >= 0 and numbers[-1] < size
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_statistics_of_damaged_data_are_refused(folder: Path) -> None:
    rewrite(folder, "train/00000.npy", foreign_ids)
    with pytest.raises(UserError, match=r"train/00000.npy holds the id 4097.*verify"):
        split_statistics(opened(folder), "train")
    (folder / "valid/00000.npy").unlink()
    with pytest.raises(UserError, match=r"valid/00000.npy is missing"):
        split_statistics(opened(folder), "valid")


def printed(renderable: object) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_tables_and_samples(made: Path) -> None:
    folder, tokenizer = opened(made), load_tokenizer(None)
    found = verify(folder, num_samples=2)
    contents = printed(contents_table(folder.manifest, {"train": 1234567.0}))
    train = folder.manifest.splits["train"]
    assert f"{train.num_tokens:,}" in contents and "1,234,567" in contents
    assert "tokens a second" not in printed(contents_table(folder.manifest))
    histogram = printed(histogram_table(found.counts_V, tokenizer))
    first = int(found.counts_V.argmax())
    assert tokenizer.token(first) in histogram
    assert f"{100 * found.counts_V[first] / found.counts_V.sum():.2f}%" in histogram
    assert f"The 20 most frequent of {found.counts_V.sum():,} tokens" in histogram
    assert "?" in printed(histogram_table(found.counts_V, None))
    samples = printed(show_samples(found.samples, tokenizer))
    assert f"block {found.samples[0].block}" in samples and "a dark night" in samples
    assert "[bold]" in samples, "brackets in a text are no markup"
    statistics = {name: split_statistics(folder, name) for name in folder.manifest.splits}
    shown = printed(statistics_table(statistics, tokenizer))
    assert f"{statistics['valid'].block_entropy:.3f}" in shown and "token of rank 10 " in shown


def test_text_of_a_block_shows_where_documents_meet() -> None:
    tokenizer = load_tokenizer(None)
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert block_text(np.array([bos, *one, eos, *two, eos]), tokenizer) == "one </s> two"
    assert block_text(np.array([bos, *one, eos, eos, eos]), tokenizer) == "one"


def test_plot(made: Path, tmp_path: Path) -> None:
    folder, tokenizer = opened(made), load_tokenizer(None)
    both = {name: split_statistics(folder, name) for name in folder.manifest.splits}
    plot_statistics(both, tokenizer, "title", tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot_statistics({"valid": both["valid"]}, tokenizer, "title", tmp_path / "plot.svg")
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        plot_statistics(both, tokenizer, "title", tmp_path / "file" / "plot.png")
