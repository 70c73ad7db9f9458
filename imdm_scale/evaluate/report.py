"""`tools/evaluate.py report`: evaluations side by side, on one page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imdm_scale.config.nearest import near_files
from imdm_scale.data.durable import write_whole
from imdm_scale.data.tokenizer import Tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.folder import FILE_NAME, LIKELIHOOD_FILE, SCORES_FILE, Cell, EvaluationFolder
from imdm_scale.evaluate.report_page import page
from imdm_scale.evaluate.report_plots import plot_frontier, plot_quality, plot_training

PAGE = "report.html"
METRICS = "metrics.jsonl"
PARENTS = 3
"""So far above a model's folder its training run is looked for."""


@dataclass(frozen=True)
class ReportRun:
    """What is known of one run."""

    name: str
    """As it was given; the tables' and plots' label."""
    folder: EvaluationFolder | None
    """None for a training run without an evaluation."""
    scores: dict[str, Any] = field(default_factory=dict)
    """`SCORES_FILE`: by judge."""
    likelihood: dict[str, Any] = field(default_factory=dict)
    """`LIKELIHOOD_FILE`: by data."""
    training: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the training run's metrics.jsonl."""
    tokenizer: Tokenizer | None = None

    def texts(self, cell: Cell, count: int) -> list[str]:
        """The first samples of a cell; none where it has not been sampled."""
        if self.folder is None or self.tokenizer is None or not self.folder.num_samples(cell):
            return []
        return [self.tokenizer.decode(ids_L) for ids_L in self.folder.samples(cell)[:count].tolist()]


def write_report(paths: Sequence[Path], out: Path, num_texts: int) -> Path:
    """Writes `report.html` and its pictures to `out`; returns the page.

    Args:
        paths: folders of evaluations, or of training runs with evaluations in them.
        num_texts: samples of each run that are shown.

    Raises:
        UserError: there is nothing to report, or `out` cannot be written.
    """
    runs = [run for path in paths for run in read_runs(path)]
    pictures = {}
    for judge in sorted({judge for run in runs for judge in run.scores}):
        pictures[f"quality-{judge}"] = plot_quality(runs, judge)
        pictures[f"frontier-{judge}"] = plot_frontier(runs, judge)
    pictures["training"] = plot_training(runs)
    drawn = {name: picture for name, picture in pictures.items() if picture is not None}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in drawn.items():
            (out / f"{name}.png").write_bytes(picture)
        write_whole(out / PAGE, page(runs, drawn, num_texts))
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror or error}); give another folder."
        ) from None
    return out / PAGE


def read_runs(path: Path) -> list[ReportRun]:
    """The evaluations that a path stands for: itself, or those in the folder of a training run.

    Raises:
        UserError: there is none, or a file is damaged.
    """
    if not path.is_dir():
        raise UserError(f"RUN {path} is no folder; {near_files(path)}")
    if (path / FILE_NAME).is_file():
        return [_read(str(path), path)]
    found = sorted(inside.parent for inside in path.glob(f"*/{FILE_NAME}"))
    if found:
        return [_read(str(folder), folder) for folder in found]
    training = _training(path)
    if not training:
        raise UserError(
            f"RUN {path} holds neither an evaluation ({FILE_NAME}) nor a training run ({METRICS}); name the --out of "
            "tools/evaluate.py generate, or a run_dir."
        )
    return [ReportRun(str(path), None, training=training)]


def _read(name: str, path: Path) -> ReportRun:
    folder = EvaluationFolder.read(path)
    model = Path(folder.noted("model_folder") or path)
    training = next((lines for above in list(model.parents)[:PARENTS] if (lines := _training(above))), [])
    return ReportRun(
        name,
        folder,
        folder.figures(SCORES_FILE),
        folder.figures(LIKELIHOOD_FILE),
        training,
        load_tokenizer(path / "tokenizer", setting=f"{path}'s tokenizer"),
    )


def _training(run_dir: Path) -> list[dict[str, Any]]:
    """The updates of a run; a last line that is not whole yet is left out."""
    if not (run_dir / METRICS).is_file():
        return []
    lines = []
    for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
