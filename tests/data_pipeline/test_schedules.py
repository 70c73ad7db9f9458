"""Any number of replicas, micro-batch size, reading processes and stops: one order, no sample lost or repeated."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.data.mixture import Mixture
from imdm_scale.data.place import Place
from imdm_scale.data.prepared_corpus import PreparedCorpus
from imdm_scale.data.read_ahead import read_ahead
from imdm_scale.data.stream import Stream, TokenStream
from imdm_scale.distill.batch_plan import BatchPlan
from imdm_scale.distill.replica_stream import ReplicaStream
from imdm_scale.distill.states import CorruptedData
from imdm_scale.errors import UserError
from imdm_scale.parallel.transport import Dealing
from tests.data_pipeline.prepared import open_folder, write_folder
from tests.tiny import tiny

SIZES = (3, 5, 1, 7, 4, 2, 6)
EPOCH = sum(SIZES)


@dataclass(frozen=True)
class Segment:
    """A run between two stops."""

    dp_size: int
    micro_batch_size: int
    accumulation: int
    updates: int
    ahead: int
    workers: int = 0

    @property
    def dealing(self) -> Dealing:
        global_batch_size = self.dp_size * self.micro_batch_size * self.accumulation
        return Dealing(global_batch_size, self.micro_batch_size, self.dp_size)


SEGMENTS = st.builds(
    Segment,
    dp_size=st.integers(1, 4),
    micro_batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    updates=st.integers(1, 4),
    ahead=st.integers(0, 2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "corpus"
    write_folder(path, {"train": SIZES, "valid": [2]}, window=2)
    return open_folder(path)


def corpus_stream(folder, seed) -> TokenStream:
    return TokenStream(PreparedCorpus(folder, "train"), seed)


def run_segment(stream: Stream, segment: Segment, first_sample: int) -> dict[int, int]:
    """What all replicas read, as the training loop asks for it: block by sample."""
    seen: dict[int, int] = {}
    dealing = segment.dealing
    for dp_rank in range(segment.dp_size):
        reader = ReplicaStream(
            copy.copy(stream), dealing, dp_rank, first_sample=first_sample, workers=segment.workers
        )
        plan = BatchPlan(
            stream=reader,
            states=CorruptedData(replace(tiny(), mask_token_id=2**31 - 1)),
            seed=stream.seed,
            global_batch_size=dealing.global_batch_size,
            micro_batch_size=dealing.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dealing.dp_size,
            sampling_eps=1e-3,
            first_sample=first_sample,
        )
        for step in range(segment.updates):
            plan.advance(step, segment.ahead)
            for batch in plan.micro_batches(step):
                assert torch.equal(batch.x_0_BL[:, 0] + 3, batch.x_0_BL[:, 3])
                for sample, block in zip(
                    batch.sample_ids_B.tolist(), batch.x_0_BL[:, 0].tolist(), strict=True
                ):
                    assert sample not in seen, "a sample was read twice"
                    seen[sample] = block
    return seen


def check_schedule(stream: Stream, segments: list[Segment]) -> None:
    """All segments one after the other, each going on from the integer at which the one before stopped."""
    seen: dict[int, int] = {}
    place = Place.of(stream, 0)
    for segment in segments:
        place.check(stream)
        part = run_segment(stream, segment, place.samples)
        total = segment.updates * segment.dealing.global_batch_size
        assert sorted(part) == list(range(place.samples, place.samples + total)), "a sample was dropped"
        seen |= part
        place = Place.of(stream, place.samples + total)
    blocks = [seen[sample] for sample in range(place.samples)]
    assert blocks == stream.batch(0, place.samples)[0][:, 0].tolist(), "not the one global order"
    if isinstance(stream, TokenStream):
        for start in range(0, len(blocks) - EPOCH + 1, EPOCH):
            assert sorted(blocks[start : start + EPOCH]) == list(range(EPOCH)), "an epoch is not whole"


@settings(max_examples=60)
@given(st.integers(0, 2**63), st.lists(SEGMENTS, min_size=1, max_size=5))
def test_random_schedules(folder, seed, segments):
    check_schedule(corpus_stream(folder, seed), segments)


@settings(max_examples=20)
@given(st.integers(0, 2**63), st.lists(SEGMENTS, min_size=1, max_size=4))
def test_random_schedules_over_a_mixture(folder, seed, segments):
    check_schedule(Mixture([corpus_stream(folder, seed)] * 2, [2, 1]), segments)


def test_reading_processes_change_nothing(folder):
    stream = corpus_stream(folder, 11)
    segments = [
        Segment(dp_size=2, micro_batch_size=3, accumulation=2, updates=3, ahead=1, workers=1),
        Segment(dp_size=1, micro_batch_size=4, accumulation=1, updates=5, ahead=0, workers=0),
        Segment(dp_size=1, micro_batch_size=2, accumulation=2, updates=4, ahead=2, workers=2),
    ]
    check_schedule(stream, segments)


def test_resuming_twice_and_at_the_border_of_an_epoch(folder):
    one = Segment(dp_size=1, micro_batch_size=EPOCH, accumulation=1, updates=1, ahead=0)
    stream = corpus_stream(folder, 5)
    first = run_segment(stream, one, EPOCH)
    assert first == run_segment(corpus_stream(folder, 5), one, EPOCH) and sorted(first.values()) == list(
        range(EPOCH)
    )
    check_schedule(stream, [one, one, Segment(3, 1, 1, 7, 1), Segment(1, 1, 1, 1, 0)])


def test_a_killed_reading_process_ends_the_reading(folder):
    reader = read_ahead(
        corpus_stream(folder, 1), (np.arange(8) for _ in iter(int, 1)), workers=1, pin_memory=False
    )
    next(reader)
    readers = [p for p in psutil.Process().children(recursive=True) if p.name() == "pt_data_worker"]
    assert readers
    for process in readers:
        process.kill()
    with pytest.raises(UserError, match="one of the 1 processes that read data ahead is gone"):
        for _ in reader:
            pass
