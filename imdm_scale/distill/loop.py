"""The training loop: micro-batches to gradients, gradients to an update, rounds of teachers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from imdm_scale.config.tree import Config
from imdm_scale.distill.ema import Ema
from imdm_scale.distill.learning_rate import learning_rate
from imdm_scale.distill.method import Method, Round
from imdm_scale.distill.micro_batch import BatchPlan
from imdm_scale.errors import UserError
from imdm_scale.parallel.engine import Student, Teacher


@dataclass(frozen=True)
class Update:
    """What is known after one update; the same on every rank."""

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
    """Wall-clock time since the start."""
    round: Round
    """The method's round."""


def train(
    config: Config,
    method: Method,
    student: Student,
    teacher: Teacher | None,
    ema: Ema,
    plan: BatchPlan,
    after_update: Callable[[Update], None],
) -> int:
    """Run updates until `train.max_steps` or the end of the method's schedule.

    Args:
        after_update: called on every rank after each update: metrics, progress, checkpoints.

    Returns:
        Number of updates done.

    Raises:
        UserError: the loss is no longer a finite number.
    """
    started = time.monotonic()
    tokens_per_update = config.train.global_batch_size * config.model.length
    for step in range(config.train.max_steps):
        round_ = method.round_at(step)
        if round_ is None:
            return step
        if round_.starts and round_.index > 0 and teacher is not None:
            averaged = ema.in_student() if config.method.refresh_from == "ema" else contextlib.nullcontext()
            with averaged:
                teacher.take_weights(student)
        loss = _accumulate_gradients(method, student, teacher, plan, step)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at update {step + 1}; lower train.learning_rate "
                f"({config.train.learning_rate}) or train.gradient_clipping ({config.train.gradient_clipping})."
            )
        rate = learning_rate(config.train, step)
        grad_norm = student.step(rate)
        ema.update()
        after_update(
            Update(
                step=step + 1,
                loss=loss.item(),
                grad_norm=grad_norm,
                learning_rate=rate,
                tokens=(step + 1) * tokens_per_update,
                seconds=time.monotonic() - started,
                round=round_,
            )
        )
    return config.train.max_steps


def _accumulate_gradients(
    method: Method, student: Student, teacher: Teacher | None, plan: BatchPlan, step: int
) -> torch.Tensor:
    """Backward through all of this rank's micro-batches; returns the global loss.

    The engine averages gradients over the data-parallel ranks. Each micro-batch's sum is therefore divided
    by the global normaliser and multiplied by their number, so that what comes out is the global mean.
    """
    group, dp_size = student.layout.mpu.dp, student.layout.dp_size
    micro_batches = [plan.micro_batch(step, index) for index in range(plan.num_micro_batches)]
    counts = sum(method.normaliser(micro_batch) for micro_batch in micro_batches)
    normaliser = torch.tensor(float(counts), dtype=torch.float64, device=student.device)
    dist.all_reduce(normaliser, group=group)
    normaliser.clamp_(min=1)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for index, micro_batch in enumerate(micro_batches):
        loss = method.loss(student, teacher, micro_batch) / normaliser.float()
        student.backward(loss * dp_size, is_last_micro_batch=index == len(micro_batches) - 1)
        total += loss.detach()
    dist.all_reduce(total, group=group)
    return total
