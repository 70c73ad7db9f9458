"""A checkpoint's tensors come back whole and in any part, whatever the layout that wrote them."""

from __future__ import annotations

import zlib
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from imdm_scale.checkpoint.description import read_description
from imdm_scale.checkpoint.manifest import DamagedCheckpoint, Manifest
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.split import write_split
from imdm_scale.checkpoint.verify import damages
from imdm_scale.errors import UserError
from imdm_scale.hf.export import config_from_architecture
from imdm_scale.model.weights import canonical_shapes
from tests.tiny import tiny

KINDS = ("master", "ema")
ARCHITECTURE = tiny(num_layers=4, qk_norm=True, noise_fourier=3, mlp="swiglu", mlp_size=48)
LAYOUTS = list(product((1, 2, 4), (1, 2)))


def numbers(kind: str, name: str) -> Tensor:
    """Different in every tensor, exact in bfloat16."""
    shape = canonical_shapes(ARCHITECTURE)[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}".encode()))
    return torch.randn(shape, generator=generator).bfloat16().float()


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tp, pp = request.param
    place = tmp_path_factory.mktemp("split") / "model"
    dtype = torch.float32 if pp == 1 else torch.bfloat16
    write_split(
        place, config_from_architecture(ARCHITECTURE), numbers, tp=tp, pp=pp, kinds=KINDS, dtype=dtype
    )
    return place


def test_whole_tensors_come_back(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert not list(damages(folder, manifest.files.items()))
    assert manifest.network() == ARCHITECTURE
    with CheckpointReader(folder, manifest) as reader:
        for kind in KINDS:
            found = dict(reader.tensors(kind))
            assert list(found) == list(canonical_shapes(ARCHITECTURE))
            assert all(torch.equal(found[name], numbers(kind, name)) for name in found)


@given(st.data())
def test_any_part_is_that_of_the_shard(folder: Path, data: st.DataObject) -> None:
    with CheckpointReader(folder, Manifest.read(folder)) as reader:
        name = data.draw(st.sampled_from(list(reader.shapes)))
        tp = data.draw(st.integers(0, reader.num_shards(name) - 1))
        shard = reader.placement(name).to_shard(numbers("ema", name), tp, reader.manifest.tp).flatten()
        start = data.draw(st.integers(0, shard.numel() - 1))
        count = data.draw(st.integers(1, shard.numel() - start))
        assert torch.equal(reader.part("ema", name, tp, start, count), shard[start : start + count])


def test_what_is_beside_the_numbers(tmp_path: Path) -> None:
    rank_V = torch.randperm(97)
    words = tmp_path / "words.model"
    words.write_text("a tokenizer")
    config = config_from_architecture(ARCHITECTURE, bos_token_id=1, vocabulary_order="frequency")
    write_split(
        tmp_path / "model", config, numbers, tp=2, pp=1, kinds=KINDS, rank_V=rank_V, tokenizer_files=[words]
    )
    found, its_rank_V, files = read_description(tmp_path / "model")
    assert (found.bos_token_id, found.vocabulary_order) == (1, "frequency")
    assert its_rank_V is not None and torch.equal(its_rank_V, rank_V)
    assert [path.read_text() for path in files] == ["a tokenizer"]


def test_a_piece_that_no_file_has_is_missed(folder: Path) -> None:
    manifest = Manifest.read(folder)
    file = next(iter(manifest.pieces))
    lost = manifest.pieces[file].pop()
    with pytest.raises(DamagedCheckpoint, match=f"lacks a part of {lost.name}"):
        CheckpointReader(folder, manifest)


@pytest.mark.parametrize(
    ("tp", "pp", "flag"), [(3, 1, "--tp is 3"), (1, 3, "--pp is 3"), (0, 1, "--tp is 0")]
)
def test_an_impossible_layout_is_refused(tmp_path: Path, tp: int, pp: int, flag: str) -> None:
    config = config_from_architecture(ARCHITECTURE)
    with pytest.raises(UserError, match=flag):
        write_split(tmp_path / "model", config, numbers, tp=tp, pp=pp)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        write_split(tmp_path, config_from_architecture(ARCHITECTURE), numbers, tp=1, pp=1)
