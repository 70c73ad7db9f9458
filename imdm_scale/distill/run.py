"""One training run from its configuration to its quality table, in reading order."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from imdm_scale.assets import TEACHER
from imdm_scale.checkpoint.stored_model import locate_model
from imdm_scale.checkpoint.weights import folder_weights, fresh_weights
from imdm_scale.config.architecture import Architecture, architecture_of
from imdm_scale.config.layout import run_layout
from imdm_scale.config.layout_table import layout_table
from imdm_scale.config.model_folder import STUDENT, is_hub_name
from imdm_scale.config.tree import Config
from imdm_scale.data.durable import write_whole
from imdm_scale.distill.build import Parts, build_parts
from imdm_scale.distill.console import ProgressReport, data_description, plan_table
from imdm_scale.distill.likelihood import validation_nelbo
from imdm_scale.distill.loop import Progress, Update, serve
from imdm_scale.distill.methods import method_of
from imdm_scale.distill.metrics import MetricsWriter
from imdm_scale.distill.quality import report_quality
from imdm_scale.distill.resume import (
    Resumed,
    check_place,
    check_resumed,
    check_teacher,
    find_resumed,
    set_newer_aside,
)
from imdm_scale.distill.saving import RunSaver, train_and_save, weights_hash
from imdm_scale.distill.states import CorruptedData, StateSource
from imdm_scale.distill.stored_pairs import StoredPairs
from imdm_scale.distill.student_state import restore
from imdm_scale.distill.teacher_folder import check_teacher_folder
from imdm_scale.distill.token_order import token_order
from imdm_scale.distill.training_data import TrainingData, find_data, open_data, told_by
from imdm_scale.model.weights import canonical_shapes
from imdm_scale.parallel.engine import ModelEngine
from imdm_scale.parallel.layout import build_groups
from imdm_scale.parallel.process import set_rank_label


def run(config: Config, ds_config: dict[str, Any], device: torch.device, argv: list[str]) -> None:
    """Train as configured; the student's first rank writes to `run_dir` and to the terminal.

    Args:
        argv: the words of the command, which checkpoints keep.

    Raises:
        UserError: something that only the data or the files can tell does not fit.
    """
    layout = run_layout(config, dist.get_world_size(), ds_config["zero_optimization"]["stage"])
    main_rank = layout.student.ranks[0]
    is_main = dist.get_rank() == main_rank
    set_rank_label(layout.label(dist.get_rank()))
    console = Console(quiet=not is_main)
    resumed = find_resumed(config, main_rank, console)
    begun = Progress() if resumed is None else resumed.progress
    found = find_data(config, main_rank)
    tokenizer = found.tokenizer
    architecture = architecture_of(config, tokenizer.vocab_size, tokenizer.mask_id)
    source_folder = _source_folder(config, main_rank)
    if source_folder is not None:
        check_teacher_folder(source_folder, architecture, tokenizer)
    changed = [] if resumed is None else check_resumed(resumed, config, architecture)
    if resumed is not None and config.method.has_teacher and resumed.teacher_folder is None:
        assert source_folder is not None, "a method with a teacher has one to begin with"
        check_teacher(resumed, source_folder, told_by(main_rank, lambda: weights_hash(source_folder)))

    run_dir = Path(config.run_dir)
    if is_main:
        _prepare_run_dir(run_dir, config, ds_config, resumed, console)
    dist.barrier()
    data = open_data(
        config,
        found,
        run_dir,
        main_rank,
        console,
        None if resumed is None else lambda stream: check_place(resumed, stream),
    )
    if resumed is not None:
        console.print(f"goes on after update {begun.step} from {resumed.folder}", soft_wrap=True)
        for change in changed:
            console.print(f"changed since then: {change}", highlight=False)

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
    # The teacher of the round in which the run goes on; the student's weights come with its state.
    teacher_weights = weights
    if resumed is not None and resumed.teacher_folder is not None:
        teacher_weights = folder_weights(resumed.teacher_folder, architecture, config.seed)
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
        teacher_weights,
        method,
        data.stream,
        data.first_sample,
        _states(config, architecture, data),
        data.bos_id,
        device,
        begun.step,
    )
    if resumed is not None and parts.student is not None:
        assert parts.ema is not None
        restore(parts.student, parts.ema, resumed.folder, resumed.manifest)

    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(MetricsWriter(config, run_dir, begun.step)) if is_main else None
        if parts.service is not None:
            serve(config, layout, method, parts, begun.step)
        else:
            assert parts.student is not None and parts.ema is not None
            saver = RunSaver(
                config,
                ds_config,
                parts.student,
                parts.ema,
                data,
                tokenizer,
                order,
                run_dir,
                argv,
                source_folder,
            )
            if resumed is not None and resumed.lies_in(run_dir):
                saver.writer.last_step = begun.step  # it need not be saved again
            if resumed is not None and resumed.teacher_folder is not None:
                saver.keep_teacher(resumed.teacher_folder, method, begun.step)
            with ProgressReport(console, config.train.max_steps, config.log.every, begun) as progress:
                train_and_save(config, layout, method, parts, saver, begun, _shown_by(progress, metrics))
            console.print(f"student written to {run_dir / STUDENT}")
            if config.method.name == "pretrain":
                _bound(config, parts, data, run_dir, console, is_main)
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


def _shown_by(progress: ProgressReport, metrics: MetricsWriter | None) -> Callable[[Update], None]:
    def after_update(update: Update) -> None:
        if metrics is not None:
            metrics.write(update)
        progress.show(update)

    return after_update


def _bound(
    config: Config, parts: Parts, data: TrainingData, run_dir: Path, console: Console, is_main: bool
) -> None:
    """The likelihood bound of the averaged network on held-out text. Collective over the student's ranks."""
    assert parts.student is not None and parts.ema is not None
    evaluate = config.evaluate
    with parts.ema.in_student():
        valid_blocks = data.first_blocks("valid", evaluate.max_tokens)
        bound = validation_nelbo(parts.student, valid_blocks, evaluate.batch_size, evaluate.seed)
    console.print(f"validation NELBO {bound.nelbo:.4f} nats per token")
    if is_main:
        (run_dir / "validation.json").write_text(json.dumps(asdict(bound)) + "\n")


def _states(config: Config, architecture: Architecture, data: TrainingData) -> StateSource:
    """Where the noisy states come from."""
    if data.pairs_seed is not None:
        return StoredPairs(architecture, data.pairs_seed, config.method.fresh_noise)
    return CorruptedData(architecture, coupled=config.method.name == "coupled")


def _source_folder(config: Config, main_rank: int) -> Path | None:
    """Where the first weights come from: the teacher's folder, or what a run without a teacher starts from."""
    setting = "teacher.path" if config.method.has_teacher else "train.init_from"
    name = config.teacher.path if config.method.has_teacher else config.train.init_from
    if name is None:
        return TEACHER if config.method.has_teacher else None
    if is_hub_name(name):
        return locate_model(name, setting)  # into the cache of every node
    return told_by(main_rank, lambda: locate_model(name, setting))


def _prepare_run_dir(
    run_dir: Path, config: Config, ds_config: dict[str, Any], resumed: Resumed | None, console: Console
) -> None:
    """The folder of the run that goes on, or a fresh one; what another run left there is moved aside, never
    overwritten."""
    if resumed is not None and resumed.lies_in(run_dir):
        for aside in set_newer_aside(resumed):
            console.print(
                f"a newer checkpoint, which the run does not go on from, is now {aside}", soft_wrap=True
            )
    elif run_dir.exists() and any(run_dir.iterdir()):
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir.rename(aside)
        console.print(f"{run_dir} held an earlier run, which is now {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
    write_whole(run_dir / "deepspeed.json", json.dumps(ds_config, indent=2) + "\n")
