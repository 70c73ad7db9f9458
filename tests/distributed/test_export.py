"""Whole weights come out of a network that is spread over ranks as they went in, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imdm_scale.hf.export import load_folder
from tests.distributed.cases import gathered
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_config, tensor_parallel, to_numpy, zero
from tests.tiny import plain_network, tiny, weights_of


@pytest.mark.parametrize(
    ("world_size", "tp", "stage"), [(1, 1, 1), (2, 1, 2), (2, 1, 3), (2, 2, 3), (4, 2, 3)]
)
def test_weights_and_export(pool: RankPool, tmp_path: Path, world_size: int, tp: int, stage: int) -> None:
    config = tensor_parallel(small_config(), tp)
    results = pool.run(gathered, world_size=world_size, config=config, ds_json=zero(stage), folder=tmp_path)
    given = to_numpy(weights_of(plain_network(tiny())))
    exported = [to_numpy(weights_of(load_folder(tmp_path / name))) for name in ("student", "teacher")]
    for weights in [*results, *exported]:
        assert weights.keys() == given.keys()
        assert all(np.array_equal(weights[name], given[name]) for name in given)
