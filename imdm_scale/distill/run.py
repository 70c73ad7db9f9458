"""One training run from its configuration to its quality table, in reading order."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from imdm_scale.assets import TEACHER
from imdm_scale.checkpoint.save import export_model
from imdm_scale.checkpoint.weights import folder_weights, fresh_weights
from imdm_scale.config.architecture import Architecture
from imdm_scale.config.check import architecture_of
from imdm_scale.config.tree import Config
from imdm_scale.data.packing import prepare_blocks
from imdm_scale.data.stream import TokenStream
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.distill.console import ProgressReport, plan_table
from imdm_scale.distill.ema import Ema
from imdm_scale.distill.im_sdtt import ImSdtt
from imdm_scale.distill.loop import Update, train
from imdm_scale.distill.method import Method
from imdm_scale.distill.metrics import MetricsWriter
from imdm_scale.distill.micro_batch import BatchPlan
from imdm_scale.distill.pretrain import Pretrain
from imdm_scale.distill.quality import report_quality
from imdm_scale.distill.sampling import validation_nelbo
from imdm_scale.distill.teacher_folder import check_teacher_folder
from imdm_scale.parallel.engine import ModelEngine, Student, Teacher, build_stage
from imdm_scale.parallel.layout import build_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(config: Config, ds_config: dict[str, Any], device: torch.device) -> None:
    """Train as configured; rank 0 writes to `run_dir` and to the terminal.

    Raises:
        UserError: something that only the data or the files can tell does not fit.
    """
    is_main = dist.get_rank() == 0
    console = Console(quiet=not is_main)
    tokenizer = Tokenizer.load(_path(config.tokenizer.path))
    architecture = architecture_of(config, tokenizer.vocab_size, tokenizer.mask_id)
    source_folder = _source_folder(config)
    if source_folder is not None:
        check_teacher_folder(source_folder, architecture, tokenizer)

    run_dir = Path(config.run_dir)
    if is_main:
        _make_run_dir(run_dir, config, ds_config, console)
    dist.barrier()
    data_path = _path(config.data.path)
    train_blocks = prepare_blocks(data_path, "train", tokenizer, config.model.length, run_dir / "data")
    valid_blocks = prepare_blocks(data_path, "valid", tokenizer, config.model.length, run_dir / "data")

    console.print(
        plan_table(
            config,
            architecture,
            teacher_name=str(source_folder) if config.method.name != "pretrain" else None,
            data_name=config.data.path or "the embedded books",
            num_blocks=len(train_blocks),
            zero_stage=ds_config["zero_optimization"]["stage"],
            world_size=dist.get_world_size(),
            device=device,
            run_dir=str(run_dir),
        )
    )

    student, teacher = _build_models(config, ds_config, architecture, source_folder)
    ema = Ema(student, config.train.ema_decay)
    plan = BatchPlan(
        stream=TokenStream(train_blocks, config.seed),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=student.layout.dp_rank,
        dp_size=student.layout.dp_size,
        sampling_eps=config.method.sampling_eps,
        mask_id=architecture.mask_token_id,
        device=device,
    )

    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(MetricsWriter(config, run_dir)) if is_main else None
        progress = stack.enter_context(ProgressReport(console, config.train.max_steps, config.log.every))

        def after_update(update: Update) -> None:
            if metrics is not None:
                metrics.write(update)
            progress.show(update)
            if update.step % config.train.save_every == 0 and update.step < config.train.max_steps:
                with ema.in_student():
                    export_model(student, tokenizer, run_dir / "checkpoints" / f"step-{update.step:08d}")

        train(config, _method(config), student, teacher, ema, plan, after_update)
        progress.bar.stop()

        with ema.in_student():
            export_model(student, tokenizer, run_dir / "student")
            console.print(f"student written to {run_dir / 'student'}")
            if config.method.name == "pretrain":
                nelbo = validation_nelbo(
                    student, valid_blocks, config.evaluate.batch_size, config.evaluate.seed
                )
                console.print(f"validation NELBO {nelbo:.4f} nats per token")
                if is_main:
                    (run_dir / "validation.json").write_text(json.dumps({"nelbo": nelbo}) + "\n")
            if config.evaluate.at_end:
                models: dict[str, ModelEngine] = {"student": student}
                if teacher is not None and source_folder is not None:
                    # The table compares with the teacher that the run began with, not with the last round's.
                    teacher.load(folder_weights(source_folder, architecture, config.seed))
                    models = {"teacher": teacher, "student": student}
                quality = report_quality(
                    models, config.evaluate, train_blocks, valid_blocks, tokenizer, run_dir, console
                )
                if metrics is not None:
                    metrics.write_quality(quality)


def _path(setting: str | None) -> Path | None:
    return None if setting is None else Path(setting)


def _source_folder(config: Config) -> Path | None:
    """Where the first weights come from: the teacher's folder, or what a pretraining starts from."""
    if config.method.name == "pretrain":
        return _path(config.train.init_from)
    return _path(config.teacher.path) or TEACHER


def _method(config: Config) -> Method:
    method = config.method
    if method.name == "pretrain":
        return Pretrain()
    return ImSdtt(
        method.divergence,
        method.initial_steps,
        method.steps_per_round,
        method.min_steps,
        method.teacher_temperature,
    )


def _build_models(
    config: Config, ds_config: dict[str, Any], architecture: Architecture, source_folder: Path | None
) -> tuple[Student, Teacher | None]:
    """Both networks start from the same weights; the student's mask embedding starts at zero effect."""
    dtype = DTYPES[config.train.precision]
    if source_folder is None:
        weights = fresh_weights(architecture, config.seed)
    else:
        weights = folder_weights(source_folder, architecture, config.seed)
    parallel = config.parallel
    layout = build_layout(parallel.student.tp, parallel.student.pp)
    student = Student(
        build_stage(architecture, layout, dtype, weights),
        layout,
        ds_config,
        lr=config.train.learning_rate,
        betas=(config.train.beta1, config.train.beta2),
        eps=config.train.adam_eps,
        weight_decay=config.train.weight_decay,
    )
    if config.method.name == "pretrain":
        return student, None
    teacher_layout = build_layout(parallel.teacher.tp, parallel.teacher.pp)
    return student, Teacher(
        build_stage(architecture, teacher_layout, dtype, weights), teacher_layout, ds_config
    )


def _make_run_dir(run_dir: Path, config: Config, ds_config: dict[str, Any], console: Console) -> None:
    """A fresh folder for this run; what an earlier run left there is moved aside, never overwritten."""
    if run_dir.exists() and any(run_dir.iterdir()):
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir.rename(aside)
        console.print(f"{run_dir} held an earlier run, which is now {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    (run_dir / "deepspeed.json").write_text(json.dumps(ds_config, indent=2) + "\n")
