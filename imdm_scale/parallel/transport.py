"""Which rows travel from the teacher to the student in an update: by arithmetic on the layout alone.

A slot is the place of one sample in an update's global batch. Its rows, one for each masked position, arise on the
last pipeline stage of the teacher's replica that computes the slot, equal on that stage's tensor-parallel ranks;
they are needed on all ranks of the last stage of the student's replica that computes the slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from imdm_scale.config.layout import RoleLayout, RunLayout


@dataclass(frozen=True)
class Dealing:
    """How the slots of an update are dealt to a role's data-parallel replicas and their micro-batches."""

    global_batch_size: int
    """Slots of an update; a multiple of the two others' product."""
    micro_batch_size: int
    """Slots of a micro-batch, which are neighbours."""
    dp_size: int
    """Replicas, which take micro-batches in turn."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each replica computes in one update."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def first_slot(self, dp_rank: int, index: int) -> int:
        """First slot of micro-batch `index` of a replica."""
        return (index * self.dp_size + dp_rank) * self.micro_batch_size

    def slots(self, dp_rank: int) -> tuple[int, ...]:
        """A replica's slots in the order in which it computes them, which is ascending."""
        return tuple(
            self.first_slot(dp_rank, index) + offset
            for index in range(self.num_micro_batches)
            for offset in range(self.micro_batch_size)
        )

    def replica_of(self, slot: int) -> int:
        """The replica that computes a slot."""
        return slot // self.micro_batch_size % self.dp_size


@dataclass(frozen=True)
class Message:
    """Rows that one rank hands to another (or keeps, where both are one) in every update."""

    source: int
    """Global rank, on the teacher's last stage."""
    target: int
    """Global rank, on the student's last stage."""
    slots: tuple[int, ...]
    """Whose rows, ascending: those that the source's and the target's replica have in common."""


@dataclass(frozen=True)
class Traffic:
    """One rank's part of the messages of an update."""

    rank: int
    """Global rank."""
    held: tuple[int, ...]
    """Slots whose rows arise on this rank; none unless it is on the teacher's last stage."""
    needed: tuple[int, ...]
    """Slots whose rows this rank must have; none unless it is on the student's last stage."""
    outgoing: tuple[Message, ...]
    """What it sends to other ranks."""
    kept: tuple[Message, ...]
    """What it hands to itself: one message or none."""
    incoming: tuple[Message, ...]
    """What it receives from other ranks."""


def messages(layout: RunLayout, global_batch_size: int) -> tuple[Message, ...]:
    """Every message of an update, at most one for each pair of ranks.

    A target that holds the rows keeps them. For the others the tensor-parallel ranks of the teacher's replica send
    in turn, so that of any two of them one sends at most one message more than the other.

    Args:
        layout: with a teacher.
        global_batch_size: slots of an update.
    """
    student, teacher = layout.student, _teacher(layout)
    holder_of_slot = _dealing(teacher, global_batch_size).replica_of
    sent_by_replica = [0] * teacher.dp
    plan = []
    for dp in range(student.dp):
        slots_by_holder = defaultdict(list)
        for slot in _dealing(student, global_batch_size).slots(dp):
            slots_by_holder[holder_of_slot(slot)].append(slot)
        for target in _last_stage(student, dp):
            for replica, slots in sorted(slots_by_holder.items()):
                holders = _last_stage(teacher, replica)
                if target in holders:
                    source = target
                else:
                    source = holders[sent_by_replica[replica] % len(holders)]
                    sent_by_replica[replica] += 1
                plan.append(Message(source, target, tuple(slots)))
    return tuple(plan)


def traffic(layout: RunLayout, global_batch_size: int, rank: int) -> Traffic:
    """What `rank` holds, needs, sends, keeps and receives in every update.

    Args:
        layout: with a teacher.
        global_batch_size: slots of an update.
        rank: global rank; one without a part in the traffic has empty lists.
    """
    plan = messages(layout, global_batch_size)
    return Traffic(
        rank,
        held=_slots_on(_teacher(layout), global_batch_size, rank),
        needed=_slots_on(layout.student, global_batch_size, rank),
        outgoing=_select(plan, (rank == m.source != m.target for m in plan)),
        kept=_select(plan, (rank == m.source == m.target for m in plan)),
        incoming=_select(plan, (rank == m.target != m.source for m in plan)),
    )


def _teacher(layout: RunLayout) -> RoleLayout:
    assert layout.teacher is not None, "a method without a teacher has no traffic"
    return layout.teacher


def _dealing(role: RoleLayout, global_batch_size: int) -> Dealing:
    return Dealing(global_batch_size, role.micro_batch_size, role.dp)


def _last_stage(role: RoleLayout, dp: int) -> list[int]:
    return [role.rank_at(role.pp - 1, dp, tp) for tp in range(role.tp)]


def _slots_on(role: RoleLayout, global_batch_size: int, rank: int) -> tuple[int, ...]:
    if rank not in role.ranks or role.place_of(rank).pp != role.pp - 1:
        return ()
    return _dealing(role, global_batch_size).slots(role.place_of(rank).dp)


def _select(plan: tuple[Message, ...], chosen: Iterable[bool]) -> tuple[Message, ...]:
    return tuple(message for message, is_chosen in zip(plan, chosen, strict=True) if is_chosen)
