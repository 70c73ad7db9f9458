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
from imdm_scale.config.architecture import Architecture, architecture_of
from imdm_scale.config.layout import RunLayout, run_layout
from imdm_scale.config.layout_table import layout_table
from imdm_scale.config.tree import Config
from imdm_scale.data.place import Place
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.distill.build import Parts, build_parts
from imdm_scale.distill.console import ProgressReport, data_description, plan_table
from imdm_scale.distill.likelihood import validation_nelbo
from imdm_scale.distill.loop import Update, serve, train
from imdm_scale.distill.method import Method
from imdm_scale.distill.methods import method_of
from imdm_scale.distill.metrics import MetricsWriter
from imdm_scale.distill.quality import report_quality
from imdm_scale.distill.states import CorruptedData, StateSource
from imdm_scale.distill.stored_pairs import StoredPairs
from imdm_scale.distill.teacher_folder import check_teacher_folder
from imdm_scale.distill.token_order import token_order
from imdm_scale.distill.training_data import TrainingData, find_data, open_data, told_by
from imdm_scale.evaluate.provenance import versions
from imdm_scale.model.weights import canonical_shapes
from imdm_scale.parallel.engine import ModelEngine
from imdm_scale.parallel.layout import build_groups
from imdm_scale.parallel.process import set_rank_label


def run(config: Config, ds_config: dict[str, Any], device: torch.device) -> None:
    """Train as configured; the student's first rank writes to `run_dir` and to the terminal.

    Raises:
        UserError: something that only the data or the files can tell does not fit.
    """
    layout = run_layout(config, dist.get_world_size(), ds_config["zero_optimization"]["stage"])
    main_rank = layout.student.ranks[0]
    is_main = dist.get_rank() == main_rank
    set_rank_label(layout.label(dist.get_rank()))
    console = Console(quiet=not is_main)
    found = find_data(config, main_rank)
    tokenizer = found.tokenizer
    architecture = architecture_of(config, tokenizer.vocab_size, tokenizer.mask_id)
    source_folder = _source_folder(config)
    if source_folder is not None:
        check_teacher_folder(source_folder, architecture, tokenizer)

    run_dir = Path(config.run_dir)
    if is_main:
        _make_run_dir(run_dir, config, ds_config, console)
    dist.barrier()
    data = open_data(config, found, run_dir, main_rank, console)

    console.print(
        plan_table(
            config,
            architecture,
            teacher_name=str(source_folder) if config.method.has_teacher else None,
            data=data_description(config, data.stream, data.first_sample),
            zero_stage=ds_config["zero_optimization"]["stage"],
            world_size=dist.get_world_size(),
            device=device,
            run_dir=str(run_dir),
        )
    )
    if layout.world_size > 1:
        console.print(layout_table(layout))

    groups = build_groups(layout, patience=config.teacher.timeout)
    if source_folder is None:
        weights = fresh_weights(architecture, config.seed)
    else:
        weights = folder_weights(source_folder, architecture, config.seed)
    order = told_by(
        main_rank,
        lambda: token_order(
            config.method.vocabulary_order,
            architecture.vocab_size,
            lambda: data.first_blocks("train", config.evaluate.max_tokens),
            lambda: weights("token_embedding.weight"),
        ),
    )
    method = method_of(config.method, order)
    parts = build_parts(
        config,
        ds_config,
        layout,
        groups,
        architecture,
        weights,
        method,
        data.stream,
        data.first_sample,
        _states(config, architecture, data),
        data.bos_id,
        device,
    )

    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(MetricsWriter(config, run_dir)) if is_main else None
        if parts.service is not None:
            serve(config, layout, method, parts)
        else:
            _train_and_export(
                config, layout, method, parts, tokenizer, data, order, run_dir, console, metrics
            )
        if not config.evaluate.at_end:
            return
        with contextlib.ExitStack() as averaged:
            if parts.ema is not None:
                averaged.enter_context(parts.ema.in_student())
            models: dict[str, ModelEngine | None] = {"student": parts.student}
            if layout.teacher is not None and source_folder is not None:
                # The table compares with the teacher that the run began with, not with the last round's.
                if parts.teacher is not None:
                    parts.teacher.load((name, weights(name)) for name in canonical_shapes(architecture))
                models = {"teacher": parts.teacher, "student": parts.student}
            quality = report_quality(
                models, layout, config.evaluate, data, tokenizer, order, run_dir, console
            )
        if metrics is not None:
            metrics.write_quality(quality)


def _train_and_export(
    config: Config,
    layout: RunLayout,
    method: Method,
    parts: Parts,
    tokenizer: Tokenizer,
    data: TrainingData,
    order: TokenOrder,
    run_dir: Path,
    console: Console,
    metrics: MetricsWriter | None,
) -> None:
    """The student's side: train, save on the way, export the averaged network."""
    student, ema = parts.student, parts.ema
    assert student is not None and ema is not None

    def export(name: str, step: int) -> None:
        """Write the network's present weights and their place in the data."""
        samples = data.first_sample + step * config.train.global_batch_size
        place = Place.of(data.stream, samples)
        source = _source_folder(config)
        facts = {
            "method": config.method.name,
            "updates": step,
            "samples": samples,
            "data": place.data_hash,
            "began as": {None: "initial values", TEACHER: "the packaged teacher"}.get(source, source),
            "versions": versions(),
        }
        export_model(student, tokenizer, data.bos_id, run_dir / name, place, order, facts)

    with ProgressReport(console, config.train.max_steps, config.log.every) as progress:

        def after_update(update: Update) -> None:
            if metrics is not None:
                metrics.write(update)
            progress.show(update)
            if update.step % config.train.save_every == 0 and update.step < config.train.max_steps:
                with ema.in_student():
                    export(f"checkpoints/step-{update.step:08d}", update.step)

        num_updates = train(
            config,
            layout,
            method,
            parts,
            after_update,
            lambda round_, step: export(f"teachers/round-{round_.index:02d}", step),
        )

    with ema.in_student():
        export("student", num_updates)
        console.print(f"student written to {run_dir / 'student'}")
        if config.method.name == "pretrain":
            evaluate = config.evaluate
            valid_blocks = data.first_blocks("valid", evaluate.max_tokens)
            bound = validation_nelbo(student, valid_blocks, evaluate.batch_size, evaluate.seed)
            console.print(f"validation NELBO {bound.nelbo:.4f} nats per token")
            if metrics is not None:
                (run_dir / "validation.json").write_text(json.dumps(asdict(bound)) + "\n")


def _states(config: Config, architecture: Architecture, data: TrainingData) -> StateSource:
    """Where the noisy states come from."""
    if data.pairs_seed is not None:
        return StoredPairs(architecture, data.pairs_seed, config.method.fresh_noise)
    return CorruptedData(architecture, coupled=config.method.name == "coupled")


def _path(setting: str | None) -> Path | None:
    return None if setting is None else Path(setting)


def _source_folder(config: Config) -> Path | None:
    """Where the first weights come from: the teacher's folder, or what a run without a teacher starts from."""
    if not config.method.has_teacher:
        return _path(config.train.init_from)
    return _path(config.teacher.path) or TEACHER


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
