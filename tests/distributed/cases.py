"""What the ranks of a test's world do.

Shapes: B batch, L positions, V vocabulary, S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from imdm_scale.checkpoint.save import export_model
from imdm_scale.config.deepspeed_json import resolve_ds_config
from imdm_scale.config.layout import RunLayout, run_layout
from imdm_scale.config.tree import Config
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.batch_plan import BatchPlan
from imdm_scale.distill.build import Parts, build_parts
from imdm_scale.distill.likelihood import validation_nelbo
from imdm_scale.distill.loop import Update, serve, train
from imdm_scale.distill.methods import method_of
from imdm_scale.distill.replica_stream import ReplicaStream
from imdm_scale.distill.sampling import sample_texts
from imdm_scale.parallel import compat
from imdm_scale.parallel.engine import ModelEngine, Student
from imdm_scale.parallel.layout import build_groups
from imdm_scale.parallel.shards import whole_weights
from tests.distributed.small_run import (
    Outcome,
    Weights,
    small_architecture,
    small_blocks,
    small_states,
    small_stream,
    to_numpy,
)
from tests.tiny import plain_network, random_input, source, weights_of


def build(config: Config, ds_json: dict[str, Any]) -> tuple[RunLayout, Parts]:
    """This rank's parts of a run whose networks have the plain network's random weights."""
    world_size = dist.get_world_size()
    architecture = small_architecture(config)
    ds_config = resolve_ds_config(ds_json, config, world_size, Path("zero.json"))
    layout = run_layout(config, world_size, ds_config["zero_optimization"]["stage"])
    parts = build_parts(
        config,
        ds_config,
        layout,
        build_groups(layout),
        architecture,
        source(weights_of(plain_network(architecture))),
        method_of(config.method),
        small_stream(config),
        0,
        small_states(config),
        1,
        torch.device("cpu"),
    )
    return layout, parts


def run_updates(
    config: Config, layout: RunLayout, parts: Parts, also: Callable[[Update], None] | None = None
) -> Outcome:
    """Either side of the training loop; `also` sees every update."""
    outcome = Outcome()

    def record(update: Update) -> None:
        outcome.losses.append(update.loss)
        outcome.grad_norms.append(update.grad_norm)
        outcome.transport_bytes.append(update.transport_bytes)
        if also is not None:
            also(update)

    method = method_of(config.method)
    if parts.service is not None:
        serve(config, layout, method, parts)
    else:
        train(config, layout, method, parts, record)
    return outcome


def first_update(config: Config, ds_json: dict[str, Any]) -> Update | None:
    """The first update of the small run; None on a teacher's own rank."""
    layout, parts = build(config, ds_json)
    updates: list[Update] = []
    run_updates(config, layout, parts, updates.append)
    return updates[0] if updates else None


def begin_anew(config: Config, plan: BatchPlan) -> None:
    """Let a plan's samples come from the first one on again."""
    read = plan.stream
    plan.stream = ReplicaStream(
        small_stream(config),
        plan.dealing,
        plan.dp_rank,
        replica=read.replica,
    )


def train_small(config: Config, ds_json: dict[str, Any]) -> Outcome:
    """The small run by the product's own engines, methods and loop; nothing from a teacher's own rank."""
    layout, parts = build(config, ds_json)
    outcome = run_updates(config, layout, parts)
    if parts.student is not None:
        assert parts.ema is not None
        with parts.ema.in_student():
            outcome.average = whole(parts.student)
        outcome.weights = whole(parts.student)
    return outcome


def whole(student: Student) -> Weights:
    """All weights, on every rank of the student."""
    groups, dtype = student.groups, student.stages[0].config.params_dtype
    return to_numpy(
        dict(
            whole_weights(
                student, groups.layout, student.architecture, dtype, student.device, groups.everyone
            )
        )
    )


def whole_logits_BLV(model: ModelEngine) -> np.ndarray:
    """Logits of every position over the whole vocabulary, on every rank of the network."""
    ids_BL, noise_BLD = random_input(model.architecture)
    group, vocab_size = model.groups.collection.tp, model.architecture.vocab_size

    def gathered(output: torch.Tensor, which: slice) -> torch.Tensor:
        logits_NV = model.logits(output).float()
        shards = [torch.empty_like(logits_NV) for _ in range(group.size())]
        dist.all_gather(shards, logits_NV.contiguous(), group=group)
        return torch.cat(shards, dim=-1)[:, :vocab_size]

    logits_NV = model.infer(ids_BL, lambda rows: noise_BLD[rows], torch.arange(ids_BL.numel()), gathered)
    logits_NV = model.from_last_stage(logits_NV, (ids_BL.numel(), vocab_size), torch.float32)
    return logits_NV.unflatten(0, ids_BL.shape).numpy()


def average_in_student(config: Config, ds_json: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits of the student before, inside and after `Ema.in_student`; its shards before and after."""
    layout, parts = build(config, ds_json)
    student, ema = parts.student, parts.ema
    assert student is not None and ema is not None
    run_updates(config, layout, parts)
    masters = [shard.clone() for shard in compat.master_shards(student.engine)]
    averages = [shard.clone() for shard in ema.shards]
    before = whole_logits_BLV(student)
    with ema.in_student():
        inside = whole_logits_BLV(student)
        swapped = all(
            torch.equal(now, average)
            for now, average in zip(compat.master_shards(student.engine), averages, strict=True)
        )
    restored = [*compat.master_shards(student.engine), *ema.shards]
    same = all(torch.equal(now, then) for now, then in zip(restored, masters + averages, strict=True))
    return {
        "before": before,
        "inside": inside,
        "after": whole_logits_BLV(student),
        "shards_swapped_and_restored": np.array([swapped, same]),
    }


def teacher_through_a_refresh(config: Config, ds_json: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits around a refresh of the teacher and `Teacher.load`; both networks have been used before."""
    layout, parts = build(config, ds_json)
    student, teacher, targets = parts.student, parts.teacher, parts.targets
    assert student is not None and teacher is not None and targets is not None
    logits = {"first": whole_logits_BLV(teacher)}
    run_updates(config, layout, parts)
    logits |= {"student": whole_logits_BLV(student), "unmoved": whole_logits_BLV(teacher)}
    dtype = student.stages[0].config.params_dtype
    targets.refresh(whole_weights(student, layout.student, student.architecture, dtype, student.device))
    logits["taken"] = whole_logits_BLV(teacher)
    for plan in (parts.student_plan, targets.teacher_plan):
        begin_anew(config, plan)
    run_updates(config, layout, parts)
    logits |= {"later_student": whole_logits_BLV(student), "kept": whole_logits_BLV(teacher)}
    teacher.load(weights_of(plain_network(teacher.architecture)).items())
    logits["loaded"] = whole_logits_BLV(teacher)
    return logits


def exported(config: Config, ds_json: dict[str, Any], folder: Path) -> Weights | None:
    """The student's whole weights, also written to `folder`; None on ranks without a student."""
    _, parts = build(config, ds_json)
    if parts.student is None:
        return None
    export_model(parts.student, load_tokenizer(None), 1, folder)
    return whole(parts.student)


def sampled(config: Config, ds_json: dict[str, Any]) -> list[tuple[np.ndarray, float]]:
    """Of this rank's networks, the student first: texts (S, L), and the likelihood bound on some blocks."""
    _, parts = build(config, ds_json)
    return [
        (
            sample_texts(model, SamplerSettings(num_steps=4), 13, batch_size=4, seed=5, bos_id=1).numpy(),
            validation_nelbo(model, small_blocks()[:13], batch_size=4, seed=6, num_draws=2).nelbo,
        )
        for model in (parts.student, parts.teacher)
        if model is not None
    ]
