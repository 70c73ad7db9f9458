"""A report as HTML. Every text that comes from outside passes `html.escape`: a sample may hold anything.

Beside each figure stand the numbers of the invocations that made it, which the last table spells out.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from imdm_scale.evaluate.console import number
from imdm_scale.evaluate.folder import Cell
from imdm_scale.evaluate.report_plots import near_one

if TYPE_CHECKING:
    from imdm_scale.evaluate.report import ReportRun

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 1.4em } th, td { padding: .25em .7em; vertical-align: top }
th { text-align: left; border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } small { color: #666 } img { max-width: 100% }
td.text { max-width: 26em; white-space: pre-wrap; overflow-wrap: anywhere } code { font-size: 90% }
p.note { color: #555; max-width: 52em }
"""


class Invocations:
    """Numbers the invocations of all runs, for references."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []

    def reference(self, run: ReportRun, numbers: Sequence[int]) -> str:
        """Links to some invocations of a run, as HTML."""
        assert run.folder is not None
        links = []
        for record in map(run.folder.invocation, dict.fromkeys(numbers)):
            entry = (run.name, record)
            if entry not in self.records:
                self.records.append(entry)
            place = self.records.index(entry) + 1
            links.append(f'<a href="#made-{place}">{place}</a>')
        return "<small>" + " ".join(links) + "</small>"


def page(runs: Sequence[ReportRun], pictures: Mapping[str, bytes], num_texts: int) -> str:
    """The whole page.

    Args:
        pictures: PNG files by name, `quality-JUDGE`, `frontier-JUDGE` and `training`; they are put into the page.
        num_texts: samples of each run that are shown for every number of steps.
    """
    made = Invocations()
    parts = ["<h1>Evaluation</h1>", _runs_table(runs)]
    for judge in sorted({judge for run in runs for judge in run.scores}):
        scored = [run for run in runs if judge in run.scores]
        description = scored[0].scores[judge]["judge"]["description"]
        parts += [f"<h2>Samples under {escape(description)}</h2>", _picture(pictures, f"quality-{judge}")]
        parts += [_scores_table(scored, judge, made), _frontier(scored, judge, made)]
        parts += [_picture(pictures, f"frontier-{judge}"), _task_table(scored, judge, made)]
    parts += [_likelihood_table(runs, made)]
    if "training" in pictures:
        parts += ["<h2>Training</h2>", _picture(pictures, "training")]
    parts += [_texts(runs, num_texts), _invocations_table(made)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _runs_table(runs: Sequence[ReportRun]) -> str:
    rows = []
    for run in runs:
        settings = {} if run.folder is None else run.folder.settings
        model, sampling = settings.get("model", {}), settings.get("sampling", {})
        given = ", ".join(f"{name} {value}" for name, value in sampling.items() if name != "data")
        rows.append(
            [
                _text(run.name),
                _code(model.get("weights", "not evaluated")[:16]),
                _text(model.get("dtype", "")),
                _text(given),
                _text(f"{len(run.training)} updates" if run.training else "not found"),
            ]
        )
    return _table(["run", "SHA-256 of the weights", "arithmetic", "sampling", "training run"], rows)


def _scores_table(runs: Sequence[ReportRun], judge: str, made: Invocations) -> str:
    rows: list[list[str]] = []
    data_rows: dict[tuple[str, int], list[str]] = {}
    for run in runs:
        assert run.folder is not None
        kept = run.scores[judge]
        for name, cell in kept["cells"].items():
            invocations = [*run.folder.cells[name]["invocations"], kept["invocation"]]
            rows.append(
                [
                    _text(run.name),
                    _number(cell["num_steps"]),
                    _cell(f"{cell['temperature']:g}", "n"),
                    *_measures(cell),
                    _cell_html(made.reference(run, invocations)),
                ]
            )
        data = kept["data"]
        reference = made.reference(run, [kept["invocation"]])
        data_rows.setdefault(
            (data["hash"], data["num_samples"]),
            [
                _text(f"real text: {data['name']}"),
                _text(""),
                _text(""),
                *_measures(data),
                _cell_html(reference),
            ],
        )
    heads = [
        "run", "steps", "temperature", "perplexity", "entropy", "distinct-1", "distinct-2", "distinct-3",
        "self-BLEU", "MAUVE", "texts", "made by",
    ]  # fmt: skip
    note = (
        "Perplexity and entropy (nats) with 95% intervals by bootstrap over texts. Read perplexity beside entropy: a "
        "model that repeats likely words has a low one of both."
    )
    return _note(note) + _table(heads, [*rows, *data_rows.values()])


def _measures(figures: dict[str, Any]) -> list[str]:
    mauve = figures.get("mauve")
    return [
        _interval(figures["perplexity"]),
        _interval(figures["entropy"]),
        *(_number(figures["distinct"].get(str(n))) for n in (1, 2, 3)),
        _number(figures["self_bleu"]),
        _cell("" if mauve is None else f"{mauve['value']:.3f} ± {mauve['deviation']:.3f}", "n"),
        _number(figures["num_samples"]),
    ]


def _frontier(runs: Sequence[ReportRun], judge: str, made: Invocations) -> str:
    rows = []
    for run in runs:
        assert run.folder is not None
        kept = run.scores[judge]
        for num_steps, found in kept["frontier"].items():
            if len(found["temperatures"]) < 2:
                continue
            span = f"{found['lowest_entropy']:.3f} to {found['highest_entropy']:.3f}"
            drawn = [
                invocation
                for cell in kept["cells"].values()
                if cell["num_steps"] == int(num_steps)
                for invocation in run.folder.cells[Cell(cell["num_steps"], cell["temperature"]).name][
                    "invocations"
                ]
            ]
            outside = "none: the data's entropy is outside what the temperatures reach"
            value = _text(outside) if found["perplexity"] is None else _interval(found["perplexity"])
            reference = made.reference(run, [*drawn, kept["invocation"]])
            rows.append(
                [
                    _text(run.name),
                    _cell(num_steps, "n"),
                    _text(", ".join(f"{temperature:g}" for temperature in found["temperatures"])),
                    _cell(span, "n"),
                    _number(found["data_entropy"]),
                    value,
                    _cell_html(reference),
                ]
            )
    if not rows:
        return ""
    heads = [
        "run",
        "steps",
        "temperatures",
        "entropy reached",
        "data's entropy",
        "perplexity there",
        "made by",
    ]
    return "<h3>Perplexity at the data's entropy</h3>" + _table(heads, rows)


def _task_table(runs: Sequence[ReportRun], judge: str, made: Invocations) -> str:
    rows = []
    for run in runs:
        assert run.folder is not None
        for name, cell in run.scores[judge]["cells"].items():
            if "task" not in cell:
                continue
            task, own = cell["task"], cell["task"]["of_task"]
            invocations = [*run.folder.cells[name]["invocations"], run.scores[judge]["invocation"]]
            rows.append(
                [
                    _text(run.name),
                    _number(cell["num_steps"]),
                    _cell(f"{cell['temperature']:g}", "n"),
                    _interval(task["possible"]),
                    *(
                        _cell(f"{number(task[measure])} / {number(own[measure])}", "n")
                        for measure in ("token_entropy", "total_correlation", "factorisation_error")
                    ),
                    _number(own["exact_total_correlation"]),
                    _cell_html(made.reference(run, invocations)),
                ]
            )
    if not rows:
        return ""
    heads = [
        "run", "steps", "temperature", "possible (Wilson, 95%)", "token entropy", "total correlation",
        "factorisation error", "exact total correlation", "made by",
    ]  # fmt: skip
    note = "In nats; behind the stroke what as many samples of the task itself show. A dash: infinite, or too large."
    return "<h3>Synthetic task</h3>" + _note(note) + _table(heads, rows)


def _likelihood_table(runs: Sequence[ReportRun], made: Invocations) -> str:
    rows = [
        [
            _text(run.name),
            _text(found["name"]),
            _cell(
                f"{found['nelbo']:.4f}"
                + ("" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"),
                "n",
            ),
            _number(found["perplexity"]),
            _number(found["num_sequences"]),
            _number(found["num_draws"]),
            _number(found["tokens_outside_blocks"]),
            _cell_html(made.reference(run, [found["invocation"]])),
        ]
        for run in runs
        for found in run.likelihood.values()
    ]
    if not rows:
        return ""
    heads = [
        "run", "data", "NELBO (nats a token ± standard error)", "perplexity at most", "blocks", "draws a block",
        "tokens that fill no block", "made by",
    ]  # fmt: skip
    return "<h2>Likelihood bound</h2>" + _table(heads, rows)


def _texts(runs: Sequence[ReportRun], count: int) -> str:
    """The first samples of every run, a column each, for every number of steps."""
    cells: dict[int, dict[str, Cell]] = {}
    for run in runs:
        for kept in run.scores.values():
            for cell in near_one(kept):
                chosen = Cell(cell["num_steps"], cell["temperature"])
                cells.setdefault(chosen.num_steps, {})[run.name] = chosen
    parts = []
    for num_steps in sorted(cells):
        columns = {
            f"{run.name}, temperature {cells[num_steps][run.name].temperature:g}": run.texts(
                cells[num_steps][run.name], count
            )
            for run in runs
            if run.name in cells[num_steps]
        }
        rows = [
            [_cell(texts[i] if i < len(texts) else "", "text") for texts in columns.values()]
            for i in range(count)
        ]
        parts.append(f"<h3>{num_steps} step{'s' * (num_steps > 1)}</h3>" + _table(list(columns), rows))
    return "<h2>Texts</h2>" + "".join(parts) if parts and count else ""


def _invocations_table(made: Invocations) -> str:
    rows = []
    for place, (name, record) in enumerate(made.records, 1):
        settings = {key: record[key] for key in ("seed", "dtype", "processes", "tp", "pp", "zero", "device")}
        rows.append(
            [
                f'<td id="made-{place}">{place}</td>',
                _text(name),
                _code(record["command"]),
                _code(record["commit"] or "no checkout"),
                _text(", ".join(f"{key} {value}" for key, value in settings.items())),
                _text(", ".join(f"{key} {value}" for key, value in record["versions"].items())),
                _text(record["began"]),
            ]
        )
    if not rows:
        return ""
    heads = ["", "run", "command", "commit", "settings", "versions", "began (UTC)"]
    return "<h2>How the figures were made</h2>" + _table(heads, rows)


def _picture(pictures: Mapping[str, bytes], name: str) -> str:
    if name not in pictures:
        return ""
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}"></p>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads are text, cells are HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _cell(text: object, kind: str) -> str:
    return f'<td class="{kind}">{escape(str(text))}</td>'


def _cell_html(html: str) -> str:
    return f"<td>{html}</td>"


def _text(text: object) -> str:
    return _cell_html(escape(str(text)))


def _code(text: str) -> str:
    return _cell_html(f"<code>{escape(text)}</code>")


def _number(value: float | None) -> str:
    return _cell(f"{value:,}" if isinstance(value, int) else number(value), "n")


def _interval(found: dict[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return _number(None if found is None else found["value"])
    ends = f"{number(found['low'])} to {number(found['high'])}"
    return f'<td class="n">{escape(number(found["value"]))}<br><small>{escape(ends)}</small></td>'
