"""Whole weights come out of a network that is spread over ranks as they went in, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imdm_scale.hf.export import load_folder
from tests.distributed.cases import exported
from tests.distributed.layouts import Case, disaggregated, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_architecture, to_numpy, zero
from tests.tiny import plain_network, weights_of

CASES = [
    Case(("pretrain",), student(), 1, world_size=1),
    Case(("pretrain",), student(), 2, world_size=2),
    Case(("pretrain",), student(2), 0, world_size=2),
    Case(("pretrain",), student(1, 2), 3, world_size=4),
    Case(("pretrain",), student(2, 2), 3, world_size=4),
    Case(("pretrain", "model.noise_fourier=3"), student(2, 2), 3, world_size=4),
    Case(("im_sdtt",), student(1, 2) + teacher(2) + disaggregated([0, 3]), 3, world_size=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_export(pool: RankPool, tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "student"
    results = pool.run(exported, case.world_size, config=case.config, ds_json=zero(case.stage), folder=folder)
    given = to_numpy(weights_of(plain_network(small_architecture(case.config))))
    whole = [results[rank] for rank in case.layout.student.ranks]
    for weights in [*whole, to_numpy(weights_of(load_folder(folder)))]:
        assert weights.keys() == given.keys()
        assert all(np.array_equal(weights[name], given[name]) for name in given)
