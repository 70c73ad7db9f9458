"""What a run shows on the terminal: its plan, its progress."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.tree import Config
from imdm_scale.data.mixture import PERIOD, Mixture
from imdm_scale.data.stream import Stream
from imdm_scale.distill.loop import Progress as RunProgress
from imdm_scale.distill.loop import Update


def plan_table(
    config: Config,
    architecture: Architecture,
    teacher_name: str | None,
    data: str,
    zero_stage: int,
    world_size: int,
    device: torch.device,
    run_dir: str,
) -> Table:
    """The plan of a run: who learns what from whom, on what, for how long, and where it is written."""
    train, method = config.train, config.method
    table = Table(title=f"imdm_scale: {method.name}", show_header=False, title_justify="left")
    size = f"{config.model.size}, {architecture.num_parameters() / 1e6:.2f} M parameters"
    shape = f"{architecture.num_layers} layers of width {architecture.hidden_size}, noise of {architecture.noise_dim}"
    if teacher_name is not None:
        table.add_row("teacher", f"{teacher_name}, frozen, its own ZeRO engine")
    table.add_row("student", f"{size}: {shape}")
    if method.name == "im_sdtt":
        rounds = -(-train.max_steps // method.steps_per_round)
        table.add_row(
            "rounds",
            f"up to {rounds} of {method.steps_per_round} updates; the teacher begins with "
            f"{method.initial_steps} steps, halved each round; {method.divergence}",
        )
    table.add_row("data", data)
    table.add_row(
        "updates",
        f"{train.max_steps} of {train.global_batch_size} blocks, {train.micro_batch_size} at a time; "
        f"learning rate {train.learning_rate:g}, {train.lr_schedule}",
    )
    table.add_row(
        "machine",
        f"{world_size} process{'es' * (world_size > 1)} on {device.type}, ZeRO-{zero_stage}, {train.precision}",
    )
    table.add_row("output", run_dir)
    return table


def data_description(config: Config, stream: Stream, first_sample: int) -> str:
    """What is read, in words."""
    paths = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    names = [path or "the embedded books" for path in paths]
    if isinstance(stream, Mixture):
        names = [f"{quota / PERIOD:.1%} {name}" for quota, name in zip(stream.quotas, names, strict=True)]
    what = "blocks" if config.method.name != "im_redi" else "pairs"
    text = f"{', '.join(names)}: {stream.num_blocks:,} {what} of {config.model.length} tokens"
    return text if first_sample == 0 else f"{text}, from sample {first_sample:,} on"


class ProgressReport:
    """A live bar on a terminal; a line every `log.every` updates elsewhere. A context manager.

    Args:
        total: updates in the whole run.
        every: `log.every`.
        begun: how far the run is already.
    """

    def __init__(self, console: Console, total: int, every: int, begun: RunProgress) -> None:
        self.console, self.total, self.every, self.begun = console, total, every, begun
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} steps/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(
            "training", total=total, completed=begun.step, loss=float("nan"), rate=float("nan")
        )

    def show(self, update: Update) -> None:
        """Show one update."""
        rate = (update.step - self.begun.step) / (update.seconds - self.begun.seconds)
        steps = update.round.teacher_steps
        name = "training" if steps is None else f"round {update.round.index} (teacher {steps:g} steps)"
        self.bar.update(self.task, completed=update.step, loss=update.loss, rate=rate, description=name)
        if not self.console.is_terminal and (update.step % self.every == 0 or update.step == self.total):
            left = (self.total - update.step) / rate
            self.console.print(
                f"{name}  {update.step}/{self.total}  loss {update.loss:.4f}  grad norm {update.grad_norm:.3f}  "
                f"{rate:.2f} steps/s  {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def __enter__(self) -> ProgressReport:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
