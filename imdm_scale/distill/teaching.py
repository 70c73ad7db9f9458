"""How the teacher's part of an update reaches the student: on the same ranks, or from ranks of its own.

Shapes: N masked positions, R width of a row, V one shard of the vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from imdm_scale.distill.batch_plan import BatchPlan
from imdm_scale.distill.method import Distillation
from imdm_scale.model.head import FrozenHead
from imdm_scale.parallel.engine import Teacher
from imdm_scale.parallel.hand_over import HandOver, Pending
from imdm_scale.parallel.shards import WholeTensors


class Targets(ABC):
    """What the student's loop asks for. On every rank of the student; the teacher's rows come to the last stage only.

    Args:
        head: the teacher's, where its hidden states are what comes; None elsewhere, and where tokens come.
        plan: the samples.
        ahead: updates that the teacher works ahead at most.
    """

    def __init__(self, hand_over: HandOver, head: FrozenHead | None, plan: BatchPlan, ahead: int) -> None:
        self.hand_over, self.head, self.plan, self.ahead = hand_over, head, plan, ahead
        self.pending: dict[int, Pending] = {}

    def advance(self, step: int) -> None:
        """Have the blocks of update `step`, and of those that may be set about before it is done, at hand.

        Collective over each replica.
        """
        self.plan.advance(step, self.ahead)

    @abstractmethod
    def begin(self, step: int) -> Pending:
        """Set about getting what update `step` needs."""

    @abstractmethod
    def may_begin(self, step: int) -> bool:
        """Whether update `step` can be set about before the ones ahead of it are done."""

    @abstractmethod
    def refresh(self, tensors: WholeTensors) -> None:
        """The teacher becomes the network with these weights. Nothing is pending."""

    def rows(self, step: int) -> Tensor | None:
        """The teacher's rows (N, R) for the masked positions of this rank's micro-batches in `step`."""
        if step not in self.pending:
            self.pending[step] = self.begin(step)
        ahead = step + 1
        while self.may_begin(ahead):
            if ahead not in self.pending:
                self.pending[ahead] = self.begin(ahead)
            ahead += 1
        return self.hand_over.finish(self.pending.pop(step))

    def target(self, rows_NR: Tensor) -> Tensor:
        """What rows tell: raw logits (N, V) in the student's tensor-parallel layout, or token ids (N,)."""
        return rows_NR[:, 0] if self.head is None else self.head(rows_NR)

    def needed_counts(self, step: int) -> list[int] | None:
        """Masked positions of each of this rank's samples, where their rows are needed."""
        return self.plan.joined(step).counts_B.tolist() if self.hand_over.traffic.needed else None


class ColocatedTargets(Targets):
    """Teacher and student on the same ranks.

    The teacher works up to `prefetch` updates ahead, though never beyond its round. On CUDA it has a stream and
    communicators of its own, so that its forward passes run beside the student's work on the update before.

    Args:
        teacher: this rank's part.
        teacher_plan: which samples this rank answers for as a teacher.
        last_step: no update from here on is begun.
    """

    def __init__(
        self,
        hand_over: HandOver,
        head: FrozenHead | None,
        plan: BatchPlan,
        *,
        method: Distillation,
        teacher: Teacher,
        teacher_plan: BatchPlan,
        prefetch: int,
        last_step: int,
    ) -> None:
        super().__init__(hand_over, head, plan, prefetch)
        self.method, self.teacher, self.teacher_plan = method, teacher, teacher_plan
        self.last_step = last_step
        self.current = 0
        self.stream = torch.cuda.Stream(teacher.device) if teacher.device.type == "cuda" else None

    def advance(self, step: int) -> None:
        """See `Targets.advance`; the teacher's blocks, too."""
        super().advance(step)
        self.teacher_plan.advance(step, self.ahead)

    def begin(self, step: int) -> Pending:
        """The teacher's work for an update, and its hand-over."""
        with self._own_stream():
            rows_NR, counts = teach(self.method, self.teacher, self.teacher_plan, step)
            return self.hand_over.start(step, rows_NR, counts, self.needed_counts(step))

    def may_begin(self, step: int) -> bool:
        """Within the prefetch, the round and the run."""
        if step > self.current + self.ahead or step >= self.last_step:
            return False
        mine, its = self.method.round_at(self.current), self.method.round_at(step)
        return mine is not None and its is not None and mine.index == its.index

    def rows(self, step: int) -> Tensor | None:
        """See `Targets.rows`."""
        self.current = step
        return super().rows(step)

    def refresh(self, tensors: WholeTensors) -> None:
        """Teacher and heads take their parts of the weights."""
        self.teacher.load(_passing_head(tensors, self.head))

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        # After a refresh the weights are written by the student's stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.teacher.device))
        with torch.cuda.stream(self.stream):
            yield


class RemoteTargets(Targets):
    """The student's end where the teacher has ranks of its own. The next update is fetched as soon as it is there."""

    def begin(self, step: int) -> Pending:
        """Receive; waits until the teacher has announced the update."""
        return self.hand_over.start(step, needed_counts=self.needed_counts(step))

    def may_begin(self, step: int) -> bool:
        """Whether the teacher has announced the update."""
        flow_control = self.hand_over.flow_control
        assert flow_control is not None
        return step not in self.pending and bool(flow_control.senders) and flow_control.is_announced(step)

    def refresh(self, tensors: WholeTensors) -> None:
        """The head takes its part of the weights."""
        for _ in _passing_head(tensors, self.head):
            pass


def teach(
    method: Distillation, teacher: Teacher, plan: BatchPlan, step: int
) -> tuple[Tensor | None, list[int] | None]:
    """What this rank contributes as a teacher: rows, and how many each sample has (None but on the last stage)."""
    batch = plan.joined(step)
    rows_NR = method.teach(teacher, batch)
    return rows_NR, None if rows_NR is None else batch.counts_B.tolist()


class TeacherService:
    """The teacher's end where it has ranks of its own."""

    def __init__(self, hand_over: HandOver, method: Distillation, teacher: Teacher, plan: BatchPlan) -> None:
        self.hand_over, self.method, self.teacher, self.plan = hand_over, method, teacher, plan
        self.under_way: deque[Pending] = deque()

    def serve(self, step: int) -> None:
        """Compute update `step`, whose blocks are at hand, and send it, as far ahead as the flow control allows."""
        rows_NR, counts = teach(self.method, self.teacher, self.plan, step)
        flow_control = self.hand_over.flow_control
        assert flow_control is not None
        self.under_way.append(self.hand_over.start(step, rows_NR, counts))
        while len(self.under_way) > flow_control.depth:
            self.hand_over.finish(self.under_way.popleft())

    def drain(self) -> None:
        """Wait until the student has everything."""
        flow_control = self.hand_over.flow_control
        assert flow_control is not None
        flow_control.drain()
        while self.under_way:
            self.hand_over.finish(self.under_way.popleft())

    def refresh(self, tensors: WholeTensors) -> None:
        """The teacher takes its part of the weights; all before has been received."""
        self.teacher.load(tensors)


def _passing_head(tensors: WholeTensors, head: FrozenHead | None) -> Iterator[tuple[str, Tensor]]:
    for name, whole in tensors:
        if head is not None and name.startswith("head."):
            head.write(name, whole)
        yield name, whole
