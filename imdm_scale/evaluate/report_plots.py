"""The pictures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

if TYPE_CHECKING:
    from imdm_scale.evaluate.report import ReportRun

SMOOTHED = 50
"""Points that a training curve has at most: means of equally many updates."""


def plot_quality(runs: Sequence[ReportRun], judge: str) -> bytes | None:
    """Perplexity and entropy against steps, each run at its temperature nearest to 1; None if there are no samples."""
    figure, (left, right) = _panels(2)
    data = []
    for run in runs:
        kept = run.scores.get(judge)
        if kept is None or not kept["cells"]:
            continue
        data.append(kept["data"])
        cells = near_one(kept)
        for axes, metric in ((left, "perplexity"), (right, "entropy")):
            _with_intervals(
                axes, [(cell["num_steps"], cell[metric]) for cell in cells if cell[metric]], run.name
            )
    if not data:
        return None
    steps = sorted(
        {cell["num_steps"] for run in runs if judge in run.scores for cell in near_one(run.scores[judge])}
    )
    for axes, metric, label in (
        (left, "perplexity", "generative perplexity"),
        (right, "entropy", "unigram entropy (nats)"),
    ):
        _real_text(axes, data, metric, "h")
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, labels=[str(number) for number in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("sampling steps")
        axes.set_ylabel(label)
    _log_y(left)
    left.legend(frameon=False, fontsize=8)
    return _png(figure)


def plot_frontier(runs: Sequence[ReportRun], judge: str) -> bytes | None:
    """Perplexity against entropy, a line over temperatures for each run and number of steps; None without any."""
    figure, (axes,) = _panels(1)
    data = []
    for run in runs:
        kept = run.scores.get(judge)
        if kept is None:
            continue
        cells = [cell for cell in kept["cells"].values() if cell["perplexity"]]
        for num_steps in sorted({cell["num_steps"] for cell in cells}):
            line = sorted(
                (cell["temperature"], cell["entropy"]["value"], cell["perplexity"]["value"])
                for cell in cells
                if cell["num_steps"] == num_steps
            )
            if len(line) > 1:
                data.append(kept["data"])
                label = f"{run.name}, {num_steps} step{'s' * (num_steps > 1)}"
                axes.plot([point[1] for point in line], [point[2] for point in line], "o-", label=label)
    if not data:
        return None
    _real_text(axes, data, "entropy", "v")
    axes.set_xlabel("unigram entropy (nats)")
    axes.set_ylabel("generative perplexity")
    _log_y(axes)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def plot_training(runs: Sequence[ReportRun]) -> bytes | None:
    """Loss and gradient norm against updates, in means over equal parts of the run; None without a training run."""
    figure, panels = _panels(2)
    # Two evaluations of one run have one curve.
    curves = {tuple(update["loss"] for update in run.training): run for run in runs if run.training}
    for run in curves.values():
        for axes, metric in zip(panels, ("loss", "grad_norm"), strict=True):
            parts = np.array_split(np.arange(len(run.training)), min(SMOOTHED, len(run.training)))
            steps = [np.mean([run.training[i]["step"] for i in part]) for part in parts]
            values = [np.mean([run.training[i][metric] for i in part]) for part in parts]
            axes.plot(steps, values, label=run.name)
    if not curves:
        return None
    for axes, label in zip(panels, ("loss", "gradient norm before clipping"), strict=True):
        axes.set_xlabel("update")
        axes.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def near_one(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a judge's cells those of the temperature nearest to 1 that each number of steps has, by steps."""
    nearest: dict[int, dict[str, Any]] = {}
    for cell in sorted(kept["cells"].values(), key=lambda cell: -abs(cell["temperature"] - 1)):
        nearest[cell["num_steps"]] = cell
    return [nearest[num_steps] for num_steps in sorted(nearest)]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8 * count if count > 1 else 6.4, 3.9), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.25)
    return figure, panels


def _with_intervals(axes: Axes, points: list[tuple[int, dict[str, Any]]], label: str) -> None:
    """A line with its 95% intervals, where they are known."""
    steps = [num_steps for num_steps, _ in points]
    values = [found["value"] for _, found in points]
    ends = [
        [
            abs(found["value"] - (found[end] if found[end] is not None else found["value"]))
            for _, found in points
        ]
        for end in ("low", "high")
    ]
    axes.errorbar(steps, values, yerr=ends, fmt="o-", capsize=3, label=label)


def _real_text(axes: Axes, data: list[dict[str, Any]], metric: str, direction: str) -> None:
    """A line for each real text that the runs are compared with."""
    draw = axes.axhline if direction == "h" else axes.axvline
    for index, value in enumerate(sorted({found[metric]["value"] for found in data if found[metric]})):
        draw(value, linestyle="--", color="0.4", label="real text" if index == 0 else None)


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
