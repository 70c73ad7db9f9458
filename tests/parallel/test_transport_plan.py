"""Which rows travel: the plan serves everyone once, from nearby, and evenly, in every layout."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.config.layout import RoleLayout, RunLayout
from imdm_scale.parallel.transport import Dealing, messages, traffic

dealings = st.builds(
    lambda micro, dp, count: Dealing(micro * dp * count, micro, dp),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
)


@st.composite
def roles(draw: st.DrawFn, role: str, ranks: tuple[int, ...]) -> RoleLayout:
    sizes = [(tp, pp) for tp in (1, 2, 3, 4, 8) for pp in (1, 2, 3) if len(ranks) % (tp * pp) == 0]
    tp, pp = draw(st.sampled_from(sizes))
    return RoleLayout(role, ranks, tp, pp, False, 3, draw(st.integers(1, 4)))


@st.composite
def runs(draw: st.DrawFn) -> tuple[RunLayout, int]:
    """A layout of up to 24 ranks in either placement, and a global batch size that it can deal."""
    world = tuple(range(draw(st.integers(2, 24))))
    placement = draw(st.sampled_from(["colocated", "disaggregated"]))
    teacher_ranks = student_ranks = world
    if placement == "disaggregated":
        chosen = draw(st.sets(st.sampled_from(world), min_size=1, max_size=len(world) - 1))
        teacher_ranks = tuple(sorted(chosen))
        student_ranks = tuple(rank for rank in world if rank not in chosen)
    student, teacher = draw(roles("student", student_ranks)), draw(roles("teacher", teacher_ranks))
    smallest = lcm(*(role.micro_batch_size * role.dp for role in (student, teacher)))
    return RunLayout(len(world), placement, student, teacher), smallest * draw(st.integers(1, 2))


def slots_by_rank(role: RoleLayout, global_batch_size: int) -> dict[int, list[int]]:
    """Slots of every rank on the last stage, as the training loop deals them."""
    size = role.micro_batch_size
    slots: dict[int, list[int]] = {
        role.rank_at(role.pp - 1, dp, tp): [] for dp in range(role.dp) for tp in range(role.tp)
    }
    for rank in slots:
        dp = role.place_of(rank).dp
        for index in range(global_batch_size // (size * role.dp)):
            first = (index * role.dp + dp) * size
            slots[rank] += range(first, first + size)
    return slots


@given(dealings)
def test_replicas_share_all_slots(dealing: Dealing) -> None:
    dealt = [dealing.slots(dp) for dp in range(dealing.dp_size)]
    assert sorted(sum(dealt, ())) == list(range(dealing.global_batch_size))
    for dp, slots in enumerate(dealt):
        assert all(a < b for a, b in pairwise(slots))
        assert len(slots) == dealing.num_micro_batches * dealing.micro_batch_size
        assert {dealing.replica_of(slot) for slot in slots} == {dp}


@given(runs())
def test_everyone_is_served_once_by_a_rank_that_has_the_rows(run: tuple[RunLayout, int]) -> None:
    layout, global_batch_size = run
    held, needed = (slots_by_rank(role, global_batch_size) for role in (layout.teacher, layout.student))
    plan = messages(layout, global_batch_size)
    assert all(set(message.slots) <= set(held[message.source]) for message in plan)
    served = Counter((message.target, slot) for message in plan for slot in message.slots)
    assert served == Counter((rank, slot) for rank, slots in needed.items() for slot in slots)


@given(runs())
def test_a_pair_of_ranks_has_one_message_in_the_order_of_the_slots(run: tuple[RunLayout, int]) -> None:
    plan = messages(*run)
    assert len({(message.source, message.target) for message in plan}) == len(plan)
    assert all(message.slots and list(message.slots) == sorted(message.slots) for message in plan)


@given(runs())
def test_rows_that_are_there_do_not_travel(run: tuple[RunLayout, int]) -> None:
    layout, global_batch_size = run
    held = slots_by_rank(layout.teacher, global_batch_size)
    for message in messages(layout, global_batch_size):
        if set(message.slots) & set(held.get(message.target, [])):
            assert message.source == message.target


@given(runs())
def test_tensor_parallel_ranks_of_the_teacher_send_equally_often(run: tuple[RunLayout, int]) -> None:
    layout, global_batch_size = run
    teacher = layout.teacher
    sent = Counter(m.source for m in messages(layout, global_batch_size) if m.source != m.target)
    for group in teacher.tp_groups[-teacher.dp :]:
        assert max(sent[rank] for rank in group) - min(sent[rank] for rank in group) <= 1


@given(runs())
def test_the_ranks_parts_are_the_whole_plan(run: tuple[RunLayout, int]) -> None:
    layout, global_batch_size = run
    held, needed = (slots_by_rank(role, global_batch_size) for role in (layout.teacher, layout.student))
    parts = [traffic(layout, global_batch_size, rank) for rank in range(layout.world_size)]
    for part in parts:
        assert list(part.held) == held.get(part.rank, [])
        assert list(part.needed) == needed.get(part.rank, [])
        assert len(part.kept) <= 1
        assert all(message.source == part.rank != message.target for message in part.outgoing)
        assert all(message.target == part.rank != message.source for message in part.incoming)
    plan = Counter(messages(layout, global_batch_size))
    assert Counter(m for part in parts for m in part.outgoing + part.kept) == plan
    assert Counter(m for part in parts for m in part.incoming + part.kept) == plan


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_nothing_travels_between_equal_layouts(tp: int, pp: int) -> None:
    ranks = tuple(range(8))
    student, teacher = (RoleLayout(role, ranks, tp, pp, False, 3, 2) for role in ("student", "teacher"))
    plan = messages(RunLayout(8, "colocated", student, teacher), 32)
    assert [(m.source, m.target) for m in plan] == [(rank, rank) for rank in ranks[8 - 8 // pp :]]
