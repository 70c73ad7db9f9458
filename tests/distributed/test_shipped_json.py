"""The DeepSpeed files that ship train as the plain process does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.cases import train_small
from tests.distributed.layouts import SHORT, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, small_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ds"
CASES = [
    ("zero1", 2, student() + teacher()),
    ("zero2", 2, student() + teacher()),
    ("zero3", 2, student() + teacher()),
    ("zero3_offload", 2, student() + teacher()),
    ("zero3_offload", 4, student(2, 2) + teacher(2, 2)),
    ("zero3_offload", 4, student(1, 2) + teacher(2)),
]


@pytest.mark.parametrize(("name", "world_size", "splits"), CASES)
def test_a_shipped_file_trains(
    pool: RankPool, reference: Callable[..., Outcome], name: str, world_size: int, splits: tuple[str, ...]
) -> None:
    ds_json = json.loads((FOLDER / f"{name}.json").read_text())
    config = small_config("im_sdtt", *SHORT, *splits)
    expected = reference("im_sdtt", *SHORT)
    for outcome in pool.run(train_small, world_size, config=config, ds_json=ds_json):
        assert outcome.losses == pytest.approx(expected.losses, rel=0, abs=2e-6)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=2e-6)


def test_every_shipped_file_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {name for name, _, _ in CASES}
