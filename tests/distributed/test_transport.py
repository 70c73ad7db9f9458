"""Rows reach the student whole and in order, in every layout; a side that stays away is named.

Every row says which update, slot and row it is.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from imdm_scale.config.layout import RoleLayout, RunLayout
from imdm_scale.errors import UserError
from imdm_scale.parallel import hand_over
from imdm_scale.parallel.compat import default_store
from imdm_scale.parallel.flow_control import FlowControl
from imdm_scale.parallel.hand_over import CorruptedMessage, HandOver
from imdm_scale.parallel.process import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE
from imdm_scale.parallel.transport import traffic
from tests.distributed.pool import RankPool

GLOBAL_BATCH_SIZE = 12
HIDDEN_SIZE = 3
UPDATES = 6
DEPTH = 2
Split = tuple[int, int, int]
"""Tensor-parallel size, pipeline-parallel size and micro-batch size."""


def colocated(student: Split, teacher: Split) -> RunLayout:
    world = tuple(range(4))
    return RunLayout(4, "colocated", role("student", world, student), role("teacher", world, teacher))


def disaggregated(
    student: Split, teacher: Split, teacher_ranks: tuple[int, ...], world: int = 4
) -> RunLayout:
    student_ranks = tuple(rank for rank in range(world) if rank not in teacher_ranks)
    return RunLayout(
        world,
        "disaggregated",
        role("student", student_ranks, student),
        role("teacher", teacher_ranks, teacher),
    )


def role(name: str, ranks: tuple[int, ...], split: Split) -> RoleLayout:
    tp, pp, micro_batch_size = split
    return RoleLayout(name, ranks, tp, pp, False, 3, micro_batch_size)


LAYOUTS = [
    colocated((1, 1, 1), (1, 1, 1)),
    colocated((1, 1, 3), (2, 1, 1)),
    colocated((2, 1, 1), (1, 1, 3)),
    colocated((1, 2, 2), (2, 2, 4)),
    colocated((2, 2, 2), (1, 1, 1)),
    colocated((4, 1, 4), (1, 4, 3)),
    disaggregated((1, 1, 2), (1, 1, 4), (1, 2, 3)),
    disaggregated((1, 1, 1), (1, 3, 3), (1, 2, 3)),
    disaggregated((1, 1, 2), (3, 1, 2), (0, 1, 3)),
    disaggregated((1, 1, 3), (1, 1, 2), (2, 3)),
    disaggregated((2, 1, 1), (1, 1, 3), (2, 3)),
    disaggregated((1, 2, 1), (2, 1, 2), (0, 3)),
    disaggregated((1, 1, 2), (1, 1, 3), (3,)),
    disaggregated((3, 1, 2), (1, 1, 1), (3,)),
]
CROSSED = disaggregated((1, 1, 3), (1, 1, 2), (2, 3))
"""Each of the student's ranks 0 and 1 receives from each of the teacher's ranks 2 and 3."""


def row_count(update: int, slot: int) -> int:
    """From 0 to 4; none at all in update 3."""
    return 0 if update == 3 else (5 * slot + 3 * update) % 7 % 5


def rows_of(update: int, slots: tuple[int, ...]) -> np.ndarray:
    rows = [(update, slot, row) for slot in slots for row in range(row_count(update, slot))]
    return np.array(rows, dtype=np.float32).reshape(-1, HIDDEN_SIZE)


def counts(update: int, slots: tuple[int, ...]) -> list[int] | None:
    return [row_count(update, slot) for slot in slots] or None


def own_store(name: str) -> dist.TCPStore:
    """A store as a launcher makes it, with no keys but this test's."""
    if dist.get_rank() == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        default_store().set(name, str(store.port))
        return store
    port = int(default_store().get(name))
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


class Exchange:
    """One rank's hand-over of rows that say what they are."""

    def __init__(
        self, layout: RunLayout, store: dist.Store, group: dist.ProcessGroup, **settings: Any
    ) -> None:
        self.traffic = traffic(layout, GLOBAL_BATCH_SIZE, dist.get_rank())
        apart = layout.placement == "disaggregated"
        self.dtype = settings.setdefault("dtype", torch.float32)
        self.flow_control = FlowControl(self.traffic, store, depth=DEPTH, timeout=60.0) if apart else None
        self.hand_over = HandOver(
            self.traffic,
            group,
            width=HIDDEN_SIZE,
            device=torch.device("cpu"),
            flow_control=self.flow_control,
            **settings,
        )

    def start(self, update: int) -> hand_over.Pending:
        held, needed = self.traffic.held, self.traffic.needed
        rows_NH = torch.from_numpy(rows_of(update, held)).to(self.dtype) if held else None
        return self.hand_over.start(update, rows_NH, counts(update, held), counts(update, needed))

    def finish(self, pending: hand_over.Pending) -> np.ndarray | None:
        rows_NH = self.hand_over.finish(pending)
        return None if rows_NH is None else rows_NH.float().numpy()


def exchanges_in_flight(layouts: list[RunLayout], **settings: Any) -> list[list[tuple[Any, int]]]:
    """For every layout and update the rows that this rank gets and the bytes that it received for them."""
    store, group = own_store("in flight"), dist.new_group()
    results = []
    for number, layout in enumerate(layouts):
        exchange = Exchange(layout, dist.PrefixStore(str(number), store), group, **settings)
        pending: deque[hand_over.Pending] = deque()
        outcomes = []
        for update in range(UPDATES + 1):
            if update < UPDATES:
                pending.append(exchange.start(update))
            if update > 0:
                rows = exchange.finish(pending.popleft())
                outcomes.append((rows, exchange.hand_over.bytes_received))
        results.append(outcomes)
    dist.barrier()  # rank 0 holds the store
    return results


def check(results: list[Any], layouts: list[RunLayout], itemsize: int) -> None:
    for number, layout in enumerate(layouts):
        for rank in range(layout.world_size):
            mine = traffic(layout, GLOBAL_BATCH_SIZE, rank)
            for update, (rows, bytes_received) in enumerate(results[rank][number]):
                travelled = sum(len(rows_of(update, message.slots)) for message in mine.incoming)
                assert bytes_received == travelled * HIDDEN_SIZE * itemsize
                if mine.needed:
                    np.testing.assert_array_equal(rows, rows_of(update, mine.needed))
                else:
                    assert rows is None


def test_rows_reach_every_layout(pool: RankPool) -> None:
    check(pool.run(exchanges_in_flight, 4, layouts=LAYOUTS), LAYOUTS, itemsize=4)


def test_rows_travel_in_the_teachers_dtype_and_are_verified(pool: RankPool) -> None:
    layouts = LAYOUTS[3:7]
    results = pool.run(exchanges_in_flight, 4, layouts=layouts, dtype=torch.bfloat16, checksum=True)
    check(results, layouts, itemsize=2)


def corrupted_update() -> str | None:
    """Rank 2 spoils what it sends in update 1, after the checksums have been computed."""
    exchange = Exchange(CROSSED, default_store().clone(), dist.new_group(), checksum=True)
    exchange.finish(exchange.start(0))
    checksum = hand_over.crc32

    def spoil(rows_NH: torch.Tensor) -> int:
        before = checksum(rows_NH)
        rows_NH[-1, 1] += 1
        return before

    if dist.get_rank() == 2:
        hand_over.crc32 = spoil
    try:
        exchange.finish(exchange.start(1))
    except CorruptedMessage as error:
        return str(error)
    return None


def test_a_corrupted_message_is_told(pool: RankPool) -> None:
    told = pool.run(corrupted_update, 4)
    for rank in (0, 1):
        assert f"update 1: the rows from rank 2 to rank {rank} did not arrive" in told[rank]
    assert told[2:] == [None, None]


def slow_student(updates: int) -> tuple[list[int], int]:
    """What the teacher saw received after the start of each update and after all, and how many keys are left."""
    store = own_store("slow student")
    exchange = Exchange(CROSSED, store.clone(), dist.new_group())
    received = "test/received"
    store.add(received, 0)
    dist.barrier()
    seen = []
    pending: deque[hand_over.Pending] = deque()
    for update in range(updates):
        if exchange.traffic.held:
            pending.append(exchange.start(update))
            seen.append(store.add(received, 0))
            if update == DEPTH - 1:
                store.set(f"test/ahead/{dist.get_rank()}", "")
            if len(pending) == DEPTH:
                exchange.finish(pending.popleft())
        else:
            # The teacher gets this far ahead before the student has received anything.
            store.wait([f"test/ahead/{rank}" for rank in (2, 3)])
            assert exchange.flow_control.is_announced(update) or update >= DEPTH
            time.sleep(0.02)
            begun = exchange.start(update)
            store.add(received, 1)
            exchange.finish(begun)
    if exchange.traffic.held:
        exchange.flow_control.drain()
        seen.append(store.add(received, 0))
    while pending:
        exchange.finish(pending.popleft())
    dist.barrier()
    left = store.num_keys()
    dist.barrier()
    return seen, left


def test_the_teacher_works_ahead_as_far_as_it_may(pool: RankPool) -> None:
    updates = 12
    results = pool.run(slow_student, 4, updates=updates)
    for seen, _ in results[2:]:
        assert seen[:DEPTH] == [0] * DEPTH
        # Both of the student's ranks have received all but the last DEPTH updates.
        assert all(count >= 2 * (update + 1 - DEPTH) for update, count in enumerate(seen[:-1]))
        assert seen[-1] == 2 * updates
    # DEPTH keys of each of the student's ranks and this test's three, for any number of updates.
    assert {left for _, left in results} == {2 * DEPTH + 3}


def absent_sides() -> tuple[str | None, str | None, str | None]:
    """What this rank says of a teacher of which one rank and all ranks are away, and of a student that is."""
    store = own_store("absent sides")
    rank = dist.get_rank()
    mine = traffic(CROSSED, GLOBAL_BATCH_SIZE, rank)

    def flow(name: str) -> FlowControl:
        dist.barrier()
        return FlowControl(mine, dist.PrefixStore(name, store.clone()), depth=DEPTH, timeout=0.25)

    def told(act: Any, update: int) -> str | None:
        try:
            act(update)
        except UserError as error:
            return str(error)
        return None

    one_is_away = flow("one")
    if rank == 3:
        one_is_away.before_sending(7)
    dist.barrier()
    first = told(one_is_away.before_receiving, 7) if mine.needed else None
    all_are_away = flow("all")
    second = told(all_are_away.before_receiving, 0) if mine.needed else None
    full = flow("full")
    third = [told(full.before_sending, update) for update in range(4, 5 + DEPTH)] if mine.held else [None]
    dist.barrier()
    assert third[:-1] == [None] * (len(third) - 1)
    return first, second, third[-1]


def test_a_side_that_stays_away_is_named(pool: RankPool) -> None:
    results = pool.run(absent_sides, 4)
    hint = "see what holds these ranks up, or raise teacher.timeout."
    for rank in (0, 1):
        waits = f"for 0.25 s, and the student (rank {rank}) waits for it; {hint}"
        assert results[rank] == (
            f"the teacher (rank 2) has not announced update 7 {waits}",
            f"the teacher (ranks 2, 3) has not announced update 0 {waits}",
            None,
        )
    for rank in (2, 3):
        assert results[rank][2] == (
            f"the student (ranks 0, 1) has not consumed update 4 for 0.25 s, and the teacher (rank {rank}), which "
            f"works ahead by 2 (teacher.prefetch), waits for that; {hint}"
        )


def program_whose_teacher_hangs() -> None:
    from imdm_scale.parallel.process import failures_reported, rank, start_process_group

    with failures_reported():
        start_process_group()
        mine = traffic(disaggregated((1, 1, 1), (1, 1, 1), (1,), world=2), 1, rank())
        flow_control = FlowControl(mine, default_store().clone(), depth=1, timeout=0.5)
        if mine.held:
            time.sleep(1000)
        flow_control.before_receiving(0)


def test_a_side_that_stays_away_ends_the_run_with_one_line() -> None:
    ended = RankPool(30.0).launch(program_whose_teacher_hangs, 2)
    assert ended.exit_codes == [USER_ERROR_EXIT_CODE, FAILURE_EXIT_CODE]
    assert ended.output.startswith("error: the teacher (rank 1) has not announced update 0 for 0.5 s")
    assert ended.output.count("\n") == 1
