"""The training loop: micro-batches to gradients, gradients to an update, rounds of teachers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.config.layout import RunLayout
from imdm_scale.config.tree import Config
from imdm_scale.distill.batch_plan import BatchPlan
from imdm_scale.distill.build import Parts
from imdm_scale.distill.diagnostics import LossMeter, noise_information
from imdm_scale.distill.learning_rate import learning_rate
from imdm_scale.distill.method import Distillation, Method
from imdm_scale.distill.rounds import Round
from imdm_scale.distill.teaching import Targets
from imdm_scale.distill.visits import Visitor
from imdm_scale.errors import UserError
from imdm_scale.parallel.engine import Student, Teacher
from imdm_scale.parallel.shards import whole_weights


@dataclass(frozen=True)
class Progress:
    """How far a run is, over all its starts: what a checkpoint keeps of `Update`, where each number is explained."""

    step: int = 0
    network_evaluations: int = 0
    num_clipped: int = 0
    replaced_samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Update:
    """What is known after one update; the same on every rank of the student."""

    step: int
    """Updates done, from 1."""
    loss: float
    """Global sum of losses over global normaliser: independent of ranks and micro-batches."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    learning_rate: float
    """Rate of this update."""
    tokens: int
    """Tokens of data seen since the start."""
    seconds: float
    """Wall-clock time of training since the start."""
    network_evaluations: int
    """Sequences that student and teacher have evaluated since the start: those of the loss, of its target, of
    visits."""
    num_clipped: int
    """Updates so far whose gradient was clipped."""
    visit_seconds: float
    """Seconds of this update in which states were visited; 0 where they come from data."""
    transport_bytes: int
    """Bytes of the teacher's rows that came from other ranks in this update, over all ranks."""
    data_seconds: float
    """Seconds of this update in which a rank waited for its blocks of text, on average over the ranks."""
    replaced_samples: int
    """Samples since the start whose shard was damaged and for which others stood in."""
    round: Round
    """The method's round."""
    diagnostics: dict[str, Any] | None
    """What `log.diagnose_every` asks for; None in the updates between."""

    @property
    def clipped(self) -> float:
        """Share of the updates so far whose gradient was clipped."""
        return self.num_clipped / self.step

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return Progress(**{name: getattr(self, name) for name in Progress.__annotations__})


def train(
    config: Config,
    layout: RunLayout,
    method: Method,
    parts: Parts,
    after_update: Callable[[Update], None],
    at_refresh: Callable[[Round, int], None] = lambda round_, step: None,
    begun: Progress = Progress(),
) -> int:
    """Run updates until `train.max_steps` or the end of the method's schedule. On every rank of the student.

    Args:
        after_update: called after each update: metrics, progress, checkpoints.
        at_refresh: called with a round and its first update when the student has just become the round's teacher, and
            still holds the weights that it gave.
        begun: how far the run is already.

    Returns:
        Number of updates done, those before included.

    Raises:
        UserError: the loss is no longer a finite number.
    """
    student, ema, plan = parts.student, parts.ema, parts.student_plan
    assert student is not None and ema is not None and plan is not None, "this rank has a student"
    targets, visitor = parts.targets, parts.visitor
    started = time.monotonic() - begun.seconds
    num_samples = config.train.global_batch_size
    num_evaluations, num_clipped = begun.network_evaluations, begun.num_clipped
    step = begun.step - 1
    for step, round_ in _schedule(config, method, begun.step):
        if targets is not None and _becomes_teacher(round_):
            averaged = ema.in_student() if config.method.refresh_from == "ema" else contextlib.nullcontext()
            with averaged:
                targets.refresh(_weights(student, layout, student))
                at_refresh(round_, step)
            if config.method.reset_optimizer:
                student.reset_optimizer()
        before = time.monotonic()
        plan.advance(step)
        if targets is not None:
            targets.advance(step)
        data_seconds = time.monotonic() - before
        visit_seconds = 0.0 if visitor is None else visitor.visit(step)
        meter = LossMeter(student.device) if _is_due(step, config) else None
        totals = _accumulate_gradients(method, student, targets, plan, step, data_seconds, meter)
        if not math.isfinite(totals.loss):
            raise UserError(
                f"the loss is {totals.loss} at update {step + 1}; lower train.learning_rate "
                f"({config.train.learning_rate}) or train.gradient_clipping ({config.train.gradient_clipping})."
            )
        rate = learning_rate(config.train, step)
        diagnostics = None if meter is None else _diagnostics(config, student, meter, step)
        grad_norm = student.step(rate)
        ema.update()
        num_clipped += 0 < config.train.gradient_clipping < grad_norm
        num_evaluations += num_samples * _evaluations_per_sample(method, visitor, step)
        after_update(
            Update(
                step=step + 1,
                loss=totals.loss,
                grad_norm=grad_norm,
                learning_rate=rate,
                tokens=(step + 1) * num_samples * config.model.length,
                seconds=time.monotonic() - started,
                network_evaluations=num_evaluations,
                num_clipped=num_clipped,
                visit_seconds=visit_seconds,
                transport_bytes=int(totals.transport_bytes),
                data_seconds=totals.data_seconds,
                replaced_samples=begun.replaced_samples + int(totals.replaced_samples),
                round=round_,
                diagnostics=diagnostics,
            )
        )
    return step + 1


def serve(config: Config, layout: RunLayout, method: Method, parts: Parts, first_step: int = 0) -> None:
    """The teacher's side of `train` where it has ranks of its own, from update `first_step` on."""
    teacher, service = parts.teacher, parts.service
    assert teacher is not None and service is not None, "this rank has a teacher and no student"
    for step, round_ in _schedule(config, method, first_step):
        if _becomes_teacher(round_):
            service.drain()
            service.refresh(_weights(None, layout, teacher))
        service.plan.advance(step)
        if parts.visitor is not None:
            parts.visitor.visit(step)
        service.serve(step)
    service.drain()


def _schedule(config: Config, method: Method, first_step: int) -> Iterator[tuple[int, Round]]:
    for step in range(first_step, config.train.max_steps):
        round_ = method.round_at(step)
        if round_ is None:
            return
        yield step, round_


def _becomes_teacher(round_: Round) -> bool:
    return round_.starts and round_.index > 0


def _is_due(step: int, config: Config) -> bool:
    """Whether update `step` is diagnosed: the first, and then every `log.diagnose_every`."""
    every = config.log.diagnose_every
    return every > 0 and (step == 0 or (step + 1) % every == 0)


def _evaluations_per_sample(method: Method, visitor: Visitor | None, step: int) -> int:
    by_teacher = method.teacher_evaluations(step) if isinstance(method, Distillation) else 0
    return 1 + by_teacher + (0 if visitor is None else visitor.num_steps)


def _diagnostics(config: Config, student: Student, meter: LossMeter, step: int) -> dict[str, Any]:
    """The measures of an update before its step is taken. Collective over the student's ranks."""
    groups = student.groups
    found: dict[str, Any] = meter.result(groups.everyone, counts=groups.is_last_stage and groups.tp_rank == 0)
    found["grad_norms"] = student.gradient_norms()
    if student.architecture.noise_dim:
        draws = config.log.noise_draws
        found["noise_information"] = noise_information(student, config.seed, step, draws)
    return found


def _weights(
    student: Student | None, layout: RunLayout, here: Student | Teacher
) -> Iterator[tuple[str, Tensor]]:
    dtype = here.stages[0].config.params_dtype
    return whole_weights(student, layout.student, here.architecture, dtype, here.device)


class _Totals(NamedTuple):
    """What the student's ranks know together after a backward pass; see `Update`."""

    loss: float
    transport_bytes: float
    data_seconds: float
    replaced_samples: float


def _accumulate_gradients(
    method: Method,
    student: Student,
    targets: Targets | None,
    plan: BatchPlan,
    step: int,
    data_seconds: float,
    meter: LossMeter | None,
) -> _Totals:
    """Backward through all of this rank's micro-batches, for which it waited `data_seconds`.

    The engine averages gradients over the data-parallel ranks. Each micro-batch's sum is therefore divided
    by the global normaliser and multiplied by their number, so that what comes out is the global mean.
    """
    groups, vocabulary = student.groups, student.vocabulary
    architecture, device = student.architecture, student.device
    # Of each replica one rank speaks, so that a sum over the role's ranks counts every sample once.
    speaks = groups.is_last_stage and groups.tp_rank == 0
    micro_batches = plan.micro_batches(step)
    counts = sum(method.normaliser(micro_batch) for micro_batch in micro_batches)
    normaliser = torch.tensor(float(counts) if speaks else 0.0, dtype=torch.float64, device=device)
    dist.all_reduce(normaliser, group=groups.everyone)
    normaliser.clamp_(min=1)
    scale = (groups.dp_size / normaliser).float()

    rows_NR = None if targets is None else targets.rows(step)
    parts = None
    if rows_NR is not None:
        parts = rows_NR.split([micro_batch.positions_N.numel() for micro_batch in micro_batches])
    mask_id = architecture.mask_token_id

    def loss(logits_NV: Tensor, index: int) -> Tensor:
        target = None
        if targets is not None:
            assert parts is not None
            target = targets.target(parts[index])
        losses_N = method.losses(micro_batches[index], logits_NV, target, vocabulary, mask_id)
        if meter is not None:
            meter.add(micro_batches[index], losses_N, logits_NV, vocabulary, mask_id)
        return losses_N.sum() * scale

    losses = student.accumulate(
        [micro_batch.network_input(architecture, device) for micro_batch in micro_batches], loss
    )
    totals = torch.zeros(len(_Totals._fields), dtype=torch.float64, device=device)
    if speaks:
        totals[0] = torch.stack(losses).double().sum() / groups.dp_size
    if targets is not None:
        totals[1] = targets.hand_over.bytes_received
    totals[2] = data_seconds / groups.everyone.size()
    totals[3] = plan.num_replaced
    dist.all_reduce(totals, group=groups.everyone)
    return _Totals(*totals.tolist())
