"""An evaluation's figures as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def scores_table(kept: dict[str, Any]) -> Table:
    """What a judge said: a row for each cell, real text last."""
    table = Table(
        title="Samples",
        caption=f"T: temperature. Judge: {kept['judge']['description']}. 95% intervals over samples",
    )
    for name in ("steps", "T", "perplexity", "entropy", "distinct-2", "self-BLEU"):
        table.add_column(name, justify="right")
    cells = list(kept["cells"].values())
    with_mauve = any("mauve" in figures for figures in cells)
    with_task = any("task" in figures for figures in cells)
    if with_mauve:
        table.add_column("MAUVE", justify="right")
    if with_task:
        table.add_column("possible", justify="right")
        table.add_column("total\ncorrelation", justify="right")
        table.add_column("factorisation\nerror", justify="right")
    for figures in cells:
        row = [str(figures["num_steps"]), f"{figures['temperature']:g}", *_common(figures)]
        if with_mauve:
            row.append(f"{figures['mauve']['value']:.3f}")
        if with_task:
            task = figures["task"]
            row += [
                interval(task["possible"]),
                f"{task['total_correlation']:.3f}",
                number(task["factorisation_error"]),
            ]
        table.add_row(*row)
    table.add_section()
    table.add_row("data", "", *_common(kept["data"]))
    for num_steps, found in kept["frontier"].items():
        if len(found["temperatures"]) > 1:
            there = "outside the\nfrontier" if found["perplexity"] is None else interval(found["perplexity"])
            table.add_row(num_steps, "at the data's\nentropy", there, number(found["data_entropy"]))
    return table


def likelihood_table(figures: dict[str, Any]) -> Table:
    """The bounds: a row for each corpus."""
    table = Table(title="Likelihood bound", caption="nats per token, with its standard error over blocks")
    for name in ("data", "blocks", "draws", "NELBO", "perplexity at most"):
        table.add_column(name, justify="left" if name == "data" else "right")
    for found in figures.values():
        error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"
        table.add_row(
            found["name"],
            f"{found['num_sequences']:,}",
            str(found["num_draws"]),
            f"{found['nelbo']:.4f}{error}",
            number(found["perplexity"]),
        )
    return table


def interval(found: dict[str, Any] | None) -> str:
    """The value, and below it the ends of its interval; a dash where there is no value."""
    if found is None:
        return "-"
    if found["low"] is None:
        return number(found["value"])
    return f"{number(found['value'])}\n{number(found['low'])} to {number(found['high'])}"


def number(value: float | None) -> str:
    """With as many digits as can be read; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3f}"


def _common(figures: dict[str, Any]) -> list[str]:
    distinct = figures["distinct"].get("2")
    return [
        interval(figures["perplexity"]),
        interval(figures["entropy"]),
        number(distinct),
        number(figures["self_bleu"]),
    ]
