"""Where the numbers of a run go: metrics.jsonl, and Weights & Biases if wanted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from imdm_scale.config.tree import Config
from imdm_scale.data.durable import write_whole
from imdm_scale.distill.loop import Update

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes one line an update to run_dir/metrics.jsonl; `log.wandb` decides about Weights & Biases.

    For rank 0 only. Use as a context manager.

    Args:
        first_step: the update with which the run goes on; lines of later ones, which it makes again, are taken out.
    """

    def __init__(self, config: Config, run_dir: Path, first_step: int = 0) -> None:
        self.every = config.log.every
        path = run_dir / FILE_NAME
        write_whole(path, "".join(_lines_before(path, first_step)))
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.wandb_run: Any = None
        if config.log.wandb != "off":
            import wandb

            self.wandb_run = wandb.init(
                project=config.log.wandb_project,
                mode=config.log.wandb,
                dir=run_dir,
                config=dataclasses.asdict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )

    def write(self, update: Update) -> None:
        """Record one update."""
        record: dict[str, Any] = {
            "step": update.step,
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "tokens": update.tokens,
            "seconds": round(update.seconds, 3),
            "network_evaluations": update.network_evaluations,
            "clipped": round(update.clipped, 6),
            "transport_bytes": update.transport_bytes,
            "data_seconds": round(update.data_seconds, 6),
            "replaced_samples": update.replaced_samples,
            "round": update.round.index,
        }
        if update.visit_seconds:
            record["visit_seconds"] = round(update.visit_seconds, 6)
        if update.round.teacher_steps is not None:
            record["teacher_steps"] = update.round.teacher_steps
            record["student_steps"] = update.round.teacher_steps / 2
        if update.diagnostics is not None:
            record["diagnostics"] = update.diagnostics
        self.file.write(json.dumps(record) + "\n")
        if self.wandb_run is not None and update.step % self.every == 0:
            self.wandb_run.log(record, step=update.step)

    def write_quality(self, quality: dict[str, Any]) -> None:
        """Record the final table in Weights & Biases."""
        if self.wandb_run is not None:
            self.wandb_run.summary["quality"] = quality

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def _lines_before(path: Path, first_step: int) -> list[str]:
    """The whole lines of the updates before `first_step`; the last line may be torn where the run was killed."""
    if first_step == 0 or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
