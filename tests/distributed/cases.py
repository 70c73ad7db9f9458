"""What the ranks of a test's world do.

Shapes: B batch, L positions, V vocabulary, S samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from imdm_scale.checkpoint.save import export_model
from imdm_scale.checkpoint.weights import gather_weights
from imdm_scale.config.deepspeed_json import resolve_ds_config
from imdm_scale.config.tree import Config
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.ema import Ema
from imdm_scale.distill.im_sdtt import ImSdtt
from imdm_scale.distill.loop import Update, train
from imdm_scale.distill.method import Method
from imdm_scale.distill.pretrain import Pretrain
from imdm_scale.distill.sampling import sample_texts, validation_nelbo
from imdm_scale.parallel import compat
from imdm_scale.parallel.engine import ModelEngine, Student, Teacher, build_stage
from imdm_scale.parallel.layout import build_layout
from tests.distributed.small_run import Outcome, Weights, small_blocks, small_plan, to_numpy
from tests.tiny import plain_network, random_input, source, tiny, weights_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_models(config: Config, ds_json: dict[str, Any]) -> tuple[Student, Teacher]:
    """Student and teacher with the same random weights, as the training program builds them."""
    architecture = tiny(dropout=config.model.dropout, qk_norm=config.model.qk_norm)
    ds_config = resolve_ds_config(ds_json, config, dist.get_world_size(), Path("zero.json"))
    weights = source(weights_of(plain_network(architecture)))
    dtype, parallel, settings = DTYPES[config.train.precision], config.parallel, config.train
    layout = build_layout(parallel.student.tp, parallel.student.pp)
    student = Student(
        build_stage(architecture, layout, dtype, weights),
        layout,
        ds_config,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    layout = build_layout(parallel.teacher.tp, parallel.teacher.pp)
    return student, Teacher(build_stage(architecture, layout, dtype, weights), layout, ds_config)


def _train(config: Config, student: Student, teacher: Teacher, ema: Ema) -> Outcome:
    method: Method = Pretrain()
    if config.method.name == "im_sdtt":
        settings = config.method
        method = ImSdtt(
            settings.divergence, settings.initial_steps, settings.steps_per_round, settings.min_steps
        )
    plan = small_plan(config, student.layout.dp_rank, student.layout.dp_size)
    outcome = Outcome()

    def record(update: Update) -> None:
        outcome.losses.append(update.loss)
        outcome.grad_norms.append(update.grad_norm)

    train(config, method, student, teacher, ema, plan, record)
    return outcome


def train_small(config: Config, ds_json: dict[str, Any]) -> Outcome:
    """The small run by the product's own engines, methods and loop."""
    student, teacher = build_models(config, ds_json)
    ema = Ema(student, config.train.ema_decay)
    outcome = _train(config, student, teacher, ema)
    with ema.in_student():
        outcome.average = _whole(student)
    outcome.weights = _whole(student)
    return outcome


def _whole(model: ModelEngine) -> Weights:
    return to_numpy(dict(gather_weights(model)))


def _logits_BLV(model: ModelEngine) -> np.ndarray:
    with model.evaluating():
        return model.predict(*random_input(model.architecture)).float().numpy()


def average_in_student(config: Config, ds_json: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits of the student before, inside and after `Ema.in_student`; its shards before and after."""
    student, teacher = build_models(config, ds_json)
    ema = Ema(student, config.train.ema_decay)
    _train(config, student, teacher, ema)
    masters = [shard.clone() for shard in compat.master_shards(student.engine)]
    averages = [shard.clone() for shard in ema.shards]
    before = _logits_BLV(student)
    with ema.in_student():
        inside = _logits_BLV(student)
        swapped = all(
            torch.equal(now, average)
            for now, average in zip(compat.master_shards(student.engine), averages, strict=True)
        )
    restored = [*compat.master_shards(student.engine), *ema.shards]
    same = all(torch.equal(now, then) for now, then in zip(restored, masters + averages, strict=True))
    return {
        "before": before,
        "inside": inside,
        "after": _logits_BLV(student),
        "shards_swapped_and_restored": np.array([swapped, same]),
    }


def teacher_through_a_refresh(config: Config, ds_json: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits around `Teacher.take_weights` and `Teacher.load`; both networks have been used before."""
    student, teacher = build_models(config, ds_json)
    logits = {"first": _logits_BLV(teacher)}
    ema = Ema(student, config.train.ema_decay)
    _train(config, student, teacher, ema)
    logits |= {"student": _logits_BLV(student), "unmoved": _logits_BLV(teacher)}
    teacher.take_weights(student)
    logits["taken"] = _logits_BLV(teacher)
    _train(config, student, teacher, ema)
    logits |= {"later_student": _logits_BLV(student), "kept": _logits_BLV(teacher)}
    teacher.load(source(weights_of(plain_network(teacher.architecture))))
    logits["loaded"] = _logits_BLV(teacher)
    return logits


def gathered(config: Config, ds_json: dict[str, Any], folder: Path) -> Weights:
    """The student's whole weights; the student and the teacher exported to `folder`."""
    student, teacher = build_models(config, ds_json)
    tokenizer = Tokenizer.load(None)
    for name, model in (("student", student), ("teacher", teacher)):
        export_model(model, tokenizer, folder / name)
    return _whole(student)


def sampled(config: Config, ds_json: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Texts (S, L) of the teacher, and its likelihood bound on as many blocks as fill both worlds."""
    _, teacher = build_models(config, ds_json)
    texts_SL = sample_texts(
        teacher, SamplerSettings(num_steps=4), num_samples=13, batch_size=4, seed=5, bos_id=1
    )
    return texts_SL.numpy(), validation_nelbo(teacher, small_blocks()[:16], batch_size=4, seed=6)
