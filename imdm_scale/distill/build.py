"""The networks of a run and the way between them, as far as this rank has a part in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.layout import RunLayout
from imdm_scale.config.tree import Config
from imdm_scale.data.stream import Stream
from imdm_scale.distill.batch_plan import BatchPlan
from imdm_scale.distill.ema import Ema
from imdm_scale.distill.method import Distillation, Method, Shows
from imdm_scale.distill.replica_stream import ReplicaStream
from imdm_scale.distill.states import StateSource
from imdm_scale.distill.teaching import ColocatedTargets, RemoteTargets, Targets, TeacherService
from imdm_scale.distill.visits import VisitingNetwork, Visitor
from imdm_scale.hf.export import DTYPES
from imdm_scale.model.head import FrozenHead, head_names
from imdm_scale.parallel.compat import default_store
from imdm_scale.parallel.engine import ModelEngine, Student, Teacher, teacher_ds_config
from imdm_scale.parallel.flow_control import FlowControl
from imdm_scale.parallel.hand_over import HandOver
from imdm_scale.parallel.layout import RoleGroups, RunGroups
from imdm_scale.parallel.network import build_module
from imdm_scale.parallel.transport import Dealing, traffic

WholeTensor = Callable[[str], Tensor]
"""Canonical name -> whole tensor."""


@dataclass(frozen=True)
class Parts:
    """What this rank has of a run; None where it has no part in it."""

    student: Student | None
    ema: Ema | None
    """The student's average."""
    student_plan: BatchPlan | None
    targets: Targets | None
    """The student's way to the teacher."""
    teacher: Teacher | None
    service: TeacherService | None
    """The teacher's way to the student, where it has ranks of its own."""
    visitor: Visitor | None
    """Who visits states, where they do not come from the data."""


def build_parts(
    config: Config,
    ds_config: dict[str, Any],
    layout: RunLayout,
    groups: RunGroups,
    architecture: Architecture,
    weights: WholeTensor,
    method: Method,
    stream: Stream,
    first_sample: int,
    states: StateSource,
    begins_with: int | None,
    device: torch.device,
    first_step: int = 0,
) -> Parts:
    """Networks with the given weights and what connects them. Collective over all ranks of the run.

    Both networks start from the same weights; the student's mask embedding starts at zero effect.

    Args:
        stream: all blocks of the run.
        first_sample: number in the stream of the run's first sample.
        states: what becomes of the blocks.
        begins_with: the token that begins every block (BOS); None if there is none.
        first_step: the update with which the run goes on.
    """

    def plan(groups: RoleGroups) -> BatchPlan:
        return _plan(config, groups, stream, states, first_sample, first_step, device)

    student = ema = student_plan = teacher = teacher_plan = None
    dtype = DTYPES[config.train.precision]
    if groups.student is not None:
        student = _build_student(config, ds_config, groups.student, architecture, weights)
        ema = Ema(student, config.train.ema_decay)
        student_plan = plan(groups.student)
    if layout.teacher is None:
        return Parts(student, ema, student_plan, None, None, None, None)
    assert isinstance(method, Distillation), "a teacher is there for a method that has one"

    if groups.teacher is not None:
        teacher = build_teacher(ds_config, groups.teacher, architecture, dtype, weights)
        teacher_plan = plan(groups.teacher)
    width, row_dtype = (1, torch.int64) if method.shows is Shows.TOKEN else (architecture.hidden_size, dtype)
    hand_over = _hand_over(config, layout, groups, width, row_dtype, device)
    visitor = None
    if config.method.states != "data":
        visitor = _visitor(
            config,
            layout,
            method,
            begins_with,
            None if student is None or student_plan is None else (student, student_plan),
            None if teacher is None or teacher_plan is None else (teacher, teacher_plan),
            device,
        )
    if groups.student is None:
        assert teacher is not None and teacher_plan is not None
        service = TeacherService(hand_over, method, teacher, teacher_plan)
        return Parts(None, None, None, None, teacher, service, visitor)

    assert student_plan is not None
    head = None
    if groups.student.is_last_stage and method.shows is Shows.DISTRIBUTION:
        head = _teachers_head(groups, teacher)
        if head is None:
            head = FrozenHead(architecture, groups.student.collection, dtype, device)
            for name in head_names(architecture):
                head.write(name, weights(name))
    # Visited states are known no sooner than the update before is done.
    ahead = config.teacher.prefetch if visitor is None else 0
    if teacher is None:
        targets: Targets = RemoteTargets(hand_over, head, student_plan, ahead)
    else:
        assert teacher_plan is not None
        targets = ColocatedTargets(
            hand_over,
            head,
            student_plan,
            method=method,
            teacher=teacher,
            teacher_plan=teacher_plan,
            prefetch=ahead,
            last_step=config.train.max_steps,
        )
    return Parts(student, ema, student_plan, targets, teacher, None, visitor)


def _build_student(
    config: Config,
    ds_config: dict[str, Any],
    groups: RoleGroups,
    architecture: Architecture,
    weights: WholeTensor,
) -> Student:
    train = config.train
    module = build_module(
        architecture, groups, ds_config, DTYPES[train.precision], weights, recompute=train.recompute
    )
    return Student(
        module,
        groups,
        ds_config,
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )


def build_teacher(
    ds_config: dict[str, Any],
    groups: RoleGroups,
    architecture: Architecture,
    dtype: torch.dtype,
    weights: WholeTensor,
) -> Teacher:
    """A frozen network with the given weights."""
    its_config = teacher_ds_config(ds_config, groups.layout.zero_stage)
    module = build_module(architecture, groups, its_config, dtype, weights, has_head=False)
    teacher = Teacher(module, groups, its_config)
    if teacher.head is not None:
        for name in head_names(architecture):
            teacher.head.write(name, weights(name))
    return teacher


def _plan(
    config: Config,
    groups: RoleGroups,
    stream: Stream,
    states: StateSource,
    first_sample: int,
    first_step: int,
    device: torch.device,
) -> BatchPlan:
    global_batch_size, micro_batch_size = config.train.global_batch_size, groups.layout.micro_batch_size
    return BatchPlan(
        stream=ReplicaStream(
            copy.copy(stream),  # teacher and student are at different places of it
            Dealing(global_batch_size, micro_batch_size, groups.dp_size),
            groups.dp_rank,
            first_sample=first_sample,
            first_step=first_step,
            replica=groups.replica,
            workers=config.data.workers,
            pin_memory=device.type == "cuda",
        ),
        states=states,
        seed=config.seed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        sampling_eps=config.method.sampling_eps,
        first_sample=first_sample,
    )


def _visitor(
    config: Config,
    layout: RunLayout,
    method: Distillation,
    begins_with: int | None,
    student: tuple[Student, BatchPlan] | None,
    teacher: tuple[Teacher, BatchPlan] | None,
    device: torch.device,
) -> Visitor:
    settings = config.method
    by_teacher = settings.states == "teacher"
    role = layout.teacher if by_teacher else layout.student
    assert role is not None
    mine: tuple[ModelEngine, BatchPlan] | None = teacher if by_teacher else student
    network = None
    if mine is not None:
        network = VisitingNetwork(mine[0], mine[1], method)
    return Visitor(
        network=network,
        plans=[plan for _, plan in filter(None, (student, teacher))],
        num_steps=settings.visit_steps,
        share=settings.visit_share if settings.states == "mix" else 1.0,
        first_rank=role.ranks[0],
        network_is_everywhere=len(role.ranks) == layout.world_size,
        begins_with=begins_with,
        device=device,
    )


def _hand_over(
    config: Config,
    layout: RunLayout,
    groups: RunGroups,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> HandOver:
    mine = traffic(layout, config.train.global_batch_size, dist.get_rank())
    flow_control = None
    if layout.placement == "disaggregated":
        # A connection of its own: a wait would block the thread that watches for failures.
        flow_control = FlowControl(
            mine, default_store().clone(), depth=config.teacher.prefetch, timeout=config.teacher.timeout
        )
    return HandOver(
        mine,
        groups.hand_over,
        width=width,
        dtype=dtype,
        device=device,
        checksum=config.teacher.checksum,
        flow_control=flow_control,
    )


def _teachers_head(groups: RunGroups, teacher: Teacher | None) -> FrozenHead | None:
    """The teacher's own head, where it is cut as the student needs it."""
    if teacher is None or groups.student is None or groups.teacher is None:
        return None
    mine, its = groups.student, groups.teacher
    same = mine.tp_size == its.tp_size and mine.pp_size == its.pp_size
    return teacher.head if same else None
