"""The DeepSpeed files that ship train as the plain process does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.cases import train_small
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, small_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ds"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_shipped_file_trains(pool: RankPool, reference: Callable[..., Outcome], name: str) -> None:
    ds_json = json.loads((FOLDER / f"{name}.json").read_text())
    results = pool.run(
        train_small, world_size=2, config=small_config("im_sdtt", max_steps=3), ds_json=ds_json
    )
    expected = reference("im_sdtt")
    assert results[0].losses == pytest.approx(expected.losses[:3], rel=0, abs=2e-6)
    assert results[0].grad_norms == pytest.approx(expected.grad_norms[:3], rel=2e-6)


def test_every_shipped_file_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {"zero1", "zero2", "zero3", "zero3_offload"}
