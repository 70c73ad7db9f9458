"""The quality of teacher and student over sampling steps: a table, a plot, a file, and text to read.

N samples, L length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.evaluate.metrics import generative_perplexity, unigram_entropy
from imdm_scale.evaluate.ngram import NgramEvaluator

ROLES = ("teacher", "student")
METRICS = ("perplexity", "entropy")
Samples = Mapping[str, Mapping[int, np.ndarray]]
"""Token ids (N, L) by role and number of sampling steps."""


def quality_table(samples: Samples, data_ids_NL: np.ndarray, evaluator: NgramEvaluator) -> dict[str, Any]:
    """Perplexity and entropy of the samples of each role and number of steps, and of real text.

    Returns:
        {"teacher": {"4": {"perplexity": .., "entropy": ..}, ..}, "student": .., "data": {"perplexity": ..,
        "entropy": ..}, "evaluator": what judged}, ready for JSON. Entropy in nats.

    Raises:
        ValueError: as `generative_perplexity`.
    """

    def measure(ids_NL: np.ndarray) -> dict[str, float]:
        return {"perplexity": generative_perplexity(evaluator, ids_NL), "entropy": unigram_entropy(ids_NL)}

    quality: dict[str, Any] = {
        role: {str(steps): measure(ids_NL) for steps, ids_NL in sorted(by_steps.items())}
        for role, by_steps in samples.items()
    }
    return {**quality, "data": measure(data_ids_NL), "evaluator": evaluator.description}


def render_table(quality: dict[str, Any]) -> Table:
    """The quality as a table for a terminal: a row per number of steps, and real text in the last."""
    table = Table(title="Quality by sampling steps", caption=f"Judge: {quality['evaluator']}")
    columns = [(metric, role) for metric in METRICS for role in _roles(quality)]
    table.add_column("steps", justify="right")
    for metric, role in columns:
        table.add_column(f"{role}\n{metric}", justify="right")
    for steps in _all_steps(quality):
        cells = [(metric, quality[role].get(steps)) for metric, role in columns]
        table.add_row(steps, *(_number(cell[metric]) if cell else "" for metric, cell in cells))
    table.add_section()
    table.add_row("data", *(_number(quality["data"][metric]) for metric, _ in columns))
    return table


def plot_quality(quality: dict[str, Any], path: Path) -> None:
    """Writes a picture (its format by the suffix of `path`): perplexity and entropy against steps.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, metric, label in (
        (left, "perplexity", "generative perplexity"),
        (right, "entropy", "unigram entropy (nats)"),
    ):
        _plot_metric(axes, quality, metric)
        axes.set_xlabel("sampling steps")
        axes.set_ylabel(label)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_locator(NullLocator())
    left.legend(frameon=False)
    figure.suptitle(f"Judge: {quality['evaluator']}", fontsize=9, color="0.35")
    figure.savefig(path, dpi=150)


def show_samples(samples: Samples, num_steps: int, tokenizer: Tokenizer, count: int = 3) -> Group:
    """The first `count` samples of each role at `num_steps` steps, as text for a terminal."""
    parts: list[Rule | Text] = []
    for role, by_steps in samples.items():
        parts.append(Rule(f"{role}, {num_steps} steps" if num_steps > 1 else f"{role}, 1 step", align="left"))
        # Text, not a string: brackets in a sample are no markup.
        parts.extend(Text(f"• {tokenizer.decode(ids_L)}\n") for ids_L in by_steps[num_steps][:count])
    return Group(*parts)


def write_json(quality: dict[str, Any], path: Path) -> None:
    """Writes `quality` to `path`, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _roles(quality: dict[str, Any]) -> list[str]:
    return [role for role in ROLES if role in quality]


def _all_steps(quality: dict[str, Any]) -> list[str]:
    return sorted({steps for role in _roles(quality) for steps in quality[role]}, key=int)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _plot_metric(axes: Axes, quality: dict[str, Any], metric: str) -> None:
    """One panel: a line per role and a level for real text, the number of steps on a log axis."""
    for role, style in zip(ROLES, ("o-", "s-"), strict=True):
        points = [(int(steps), cell[metric]) for steps, cell in quality.get(role, {}).items()]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=role)
    axes.axhline(quality["data"][metric], linestyle="--", color="0.4", label="real text")
    ticks = [int(steps) for steps in _all_steps(quality)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
