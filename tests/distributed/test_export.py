"""Whole weights come out of a network that is spread over ranks as they went in, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imdm_scale.checkpoint.save import export_model
from imdm_scale.config.tree import Config
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.hf.export import load_folder, save_folder
from tests.distributed.cases import build, exported
from tests.distributed.layouts import Case, disaggregated, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_architecture, small_config, to_numpy, zero
from tests.tiny import plain_network, tiny, weights_of

CASES = [
    Case(("pretrain",), student(), 1, world_size=1),
    Case(("pretrain",), student(), 2, world_size=2),
    Case(("pretrain",), student(2), 0, world_size=2),
    Case(("pretrain",), student(1, 2), 3, world_size=4),
    Case(("pretrain",), student(2, 2), 3, world_size=4),
    Case(("pretrain", "model.noise_fourier=3"), student(2, 2), 3, world_size=4),
    Case(("im_sdtt",), student(1, 2) + teacher(2) + disaggregated([0, 3]), 3, world_size=4),
]


RANK_V = torch.randperm(tiny().vocab_size, generator=torch.Generator().manual_seed(0))


def exported_with_an_order(config: Config, ds_json: dict[str, Any], folder: Path) -> None:
    """The student, written to `folder` with an order of its vocabulary."""
    _, parts = build(config, ds_json)
    assert parts.student is not None
    export_model(parts.student, load_tokenizer(None), 1, folder, order=TokenOrder("frequency", RANK_V))


def test_the_order_of_the_vocabulary_is_exported(pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    pool.run(exported_with_an_order, 2, config=small_config("pretrain"), ds_json=zero(3), folder=folder)
    model = load_folder(folder)
    assert model.config.vocabulary_order == "frequency" and model.config.sampler == "ancestral"
    assert torch.equal(model.vocabulary_rank, RANK_V)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_export(pool: RankPool, tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "student"
    results = pool.run(exported, case.world_size, config=case.config, ds_json=zero(case.stage), folder=folder)
    given = to_numpy(weights_of(plain_network(small_architecture(case.config))))
    whole = [results[rank] for rank in case.layout.student.ranks]
    for weights in [*whole, to_numpy(weights_of(load_folder(folder)))]:
        assert weights.keys() == given.keys()
        assert all(np.array_equal(weights[name], given[name]) for name in given)
    plain = plain_network(small_architecture(case.config))
    written = save_folder(plain, load_folder(folder).config, tmp_path / "plain")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (written / name).read_bytes()
