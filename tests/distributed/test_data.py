"""Tensor- and pipeline-parallel ranks get the same blocks from the one of them that reads; readers change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from imdm_scale.config.layout import run_layout
from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.distill.replica_stream import ReplicaStream
from imdm_scale.parallel.layout import build_groups
from imdm_scale.parallel.transport import Dealing
from tests.distributed.cases import train_small
from tests.distributed.parity import largest
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, small_blocks, small_config, zero

GLOBAL_BATCH, MICRO_BATCH, UPDATES, AHEAD = 8, 2, 7, 2


class CountedCorpus(ArrayCorpus):
    """Counts how often it is read."""

    reads = 0

    def open_shard(self, index: int) -> np.ndarray:
        self.reads += 1
        return super().open_shard(index)


def read_as_student(words: list[str]) -> dict[str, Any]:
    """This rank's blocks by sample, its replica, and whether it read them itself."""
    config = small_config("pretrain", *words)
    layout = run_layout(config, dist.get_world_size(), zero_stage=0)
    groups = build_groups(layout).student
    assert groups is not None
    corpus = CountedCorpus(small_blocks())
    stream = ReplicaStream(
        TokenStream(corpus, seed=7),
        Dealing(GLOBAL_BATCH, MICRO_BATCH, groups.dp_size),
        groups.dp_rank,
        replica=groups.replica,
    )
    blocks: dict[int, list[int]] = {}
    for step in range(UPDATES):
        stream.advance(step, AHEAD)
        for index in range(stream.dealing.num_micro_batches):
            first = step * GLOBAL_BATCH + stream.dealing.first_slot(groups.dp_rank, index)
            ids_BL, samples_B = stream.batch(first, MICRO_BATCH)
            assert ids_BL.dtype == torch.int64
            blocks |= dict(zip(samples_B.tolist(), ids_BL.tolist(), strict=True))
    return {"blocks": blocks, "replica": groups.dp_rank, "reads": corpus.reads > 0}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_one_rank_of_a_replica_reads(pool: RankPool, tp: int, pp: int) -> None:
    words = [
        f"parallel.student.tp={tp}",
        f"parallel.student.pp={pp}",
        f"train.micro_batch_size={MICRO_BATCH}",
    ]
    ranks = pool.run(read_as_student, 4, words=words)
    num_replicas = 4 // (tp * pp)
    assert sum(rank["reads"] for rank in ranks) == num_replicas
    whole = TokenStream(ArrayCorpus(small_blocks()), seed=7).batch(0, UPDATES * GLOBAL_BATCH)[0].tolist()
    seen: dict[int, list[int]] = {}
    for replica in range(num_replicas):
        parts = [rank["blocks"] for rank in ranks if rank["replica"] == replica]
        assert len(parts) == tp * pp and all(part == parts[0] for part in parts)
        assert not seen.keys() & parts[0].keys()
        seen |= parts[0]
    assert [seen[sample] for sample in range(UPDATES * GLOBAL_BATCH)] == whole


@pytest.mark.parametrize(
    "how",
    [
        ("parallel.student.pp=2", "teacher.prefetch=2"),
        ("parallel.teacher.tp=2", "teacher.placement=disaggregated", "teacher.prefetch=2"),
    ],
    ids=["colocated", "disaggregated"],
)
def test_reading_processes_change_nothing(
    pool: RankPool, reference: Callable[..., Outcome], how: tuple[str, ...]
) -> None:
    what = ("im_sdtt", "train.max_steps=4")
    outcomes = pool.run(
        train_small,
        4,
        config=small_config(*what, *how, "data.workers=1", micro_batch_size=2),
        ds_json=zero(0),
    )
    losses = next(outcome.losses for outcome in outcomes if outcome.losses)
    assert len(losses) == 4 and largest(losses, reference(*what).losses) < 2e-6
