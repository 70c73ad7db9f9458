"""A report of two evaluations that are written by hand, down to the last word of every sample."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.folder import LIKELIHOOD_FILE, SCORES_FILE, Cell, EvaluationFolder
from imdm_scale.evaluate.frontier import FrontierPoint
from imdm_scale.evaluate.metrics import SampleScores, sample_entropies
from imdm_scale.evaluate.report import read_runs, write_report
from imdm_scale.evaluate.scores import frontier_figures, text_figures

SCRIPT = "<script>alert('caught & quartered')</script>"
JUDGE = "ngram-01234567"


def invocation(command: str, seed: int) -> dict[str, Any]:
    return {
        "command": f"python tools/evaluate.py {command}",
        "commit": f"{seed:040x}-dirty",
        "versions": {"torch": f"2.13.{seed}", "transformers": "5.23.0"},
        "processes": 2,
        "device": "cpu",
        "began": "2026-11-26T00:00:00+00:00",
        "seed": seed,
        "dtype": "fp32",
        "tp": 2,
        "pp": 1,
        "zero": 3,
    }


def evaluation(path: Path, model: Path, seed: int, temperatures: tuple[float, ...] = (1.0, 0.5)) -> Path:
    """Samples of one invocation, scored by another; a bound by a third."""
    tokenizer = load_tokenizer(None)
    tokenizer.save(path / "tokenizer")
    ids_L = np.array([tokenizer.bos_id, *tokenizer.encode(SCRIPT)])
    rng, points, by_cell = np.random.default_rng(seed), {}, {}
    cells = [Cell(4, temperature) for temperature in temperatures]
    (path / "evaluation.json").write_text(json.dumps({"settings": {}, "invocations": [], "cells": {}}))
    with EvaluationFolder.open(path, invocation("generate --judge <first>", seed)) as folder:
        folder.claim("model", {"weights": f"{seed:064x}", "dtype": "fp32"})
        folder.claim("sampling", {"seed": seed, "sampler": "ancestral"})
        folder.note("model_folder", str(model))
        for cell in cells:
            folder.begin(cell)
            ids_SL = rng.integers(5, 5 + int(40 * cell.temperature), (6, len(ids_L)))
            ids_SL[0] = ids_L
            folder.add_samples(cell, ids_SL.astype(np.uint16), 1.0)
    with EvaluationFolder.open(path, invocation("generate --judge second", seed)) as folder:
        for cell in cells:
            ids_SL = folder.samples(cell)
            scores = SampleScores(rng.gamma(9.0, size=6), np.full(6, 3))
            points[cell] = FrontierPoint(sample_entropies(ids_SL), scores)
            by_cell[cell.name] = {
                "num_steps": cell.num_steps,
                "temperature": cell.temperature,
                **text_figures(ids_SL, scores),
            }
        figures = {
            "judge": {"description": "a judge <b>of taste</b>"},
            "invocation": folder.this_invocation,
            "data": {"name": "<i>books</i>", "hash": "aa", **text_figures(ids_SL, scores)},
            "cells": by_cell,
            "frontier": frontier_figures(points, 99.0),
        }
        folder.keep_figures(SCORES_FILE, JUDGE, figures)
    with EvaluationFolder.open(path, invocation("likelihood", seed)) as folder:
        bound = {
            "name": "wikitext", "nelbo": 3.25, "standard_error": 0.0625, "perplexity": 25.79, "num_sequences": 1234,
            "num_draws": 8, "tokens_outside_blocks": 17, "invocation": folder.this_invocation,
        }  # fmt: skip
        folder.keep_figures(LIKELIHOOD_FILE, "wikitext", bound)
    return path


class Tags(HTMLParser):
    """Names of the tags in a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report of an evaluation alone, and of one in its training run."""
    place = tmp_path_factory.mktemp("report")
    evaluation_alone = place / "alone"
    evaluation_alone.mkdir()
    evaluation(evaluation_alone, place / "elsewhere", 11)
    run_dir = place / "run"
    (run_dir / "evaluation-student").mkdir(parents=True)
    evaluation(run_dir / "evaluation-student", run_dir / "student", 22)
    lines = [json.dumps({"step": i, "loss": 1 / i, "grad_norm": 0.1}) for i in range(1, 120)]
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 120, "lo']))
    write_report([evaluation_alone, run_dir], place / "out", 2)
    return place


def test_every_figure_tells_how_it_was_made(reported: Path) -> None:
    text = Tags((reported / "out" / "report.html").read_text()).text
    for seed in (11, 22):
        for said in (
            f"{seed:040x}-dirty",
            f"torch 2.13.{seed}",
            f"seed {seed}",
            "dtype fp32",
            "tp 2",
            "zero 3",
        ):
            assert said in text
        assert text.count(f"{seed:040x}-dirty") == 3, "sampling, scoring and the bound"
    for command in ("generate --judge <first>", "generate --judge second", "likelihood"):
        assert f"python tools/evaluate.py {command}" in text
    page = (reported / "out" / "report.html").read_text()
    rows = re.findall(r"<tr>.*?</tr>", page)
    figures = [row for row in rows if 'class="n"' in row]
    assert len(figures) == 4 + 1 + 2 + 2, "cells, real text, frontiers, bounds"
    linked = {link for row in figures for link in re.findall(r'href="#(made-\d+)"', row)}
    assert all('href="#made-' in row for row in figures)
    assert linked == set(re.findall(r'id="(made-\d+)"', page)), "and every link leads somewhere"


def test_samples_and_names_are_text(reported: Path) -> None:
    page = (reported / "out" / "report.html").read_text()
    parsed = Tags(page)
    assert "script" not in parsed.tags and "b" not in parsed.tags and "i" not in parsed.tags
    decoded = load_tokenizer(None).decode(load_tokenizer(None).encode(SCRIPT))
    assert decoded in parsed.text and parsed.text.count(decoded) == 2
    assert "a judge <b>of taste</b>" in parsed.text and "real text: <i>books</i>" in parsed.text


def test_the_page_needs_no_other_file(reported: Path) -> None:
    page = (reported / "out" / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("https://arxiv", "")
    names = sorted(path.name for path in (reported / "out").iterdir())
    assert names == [f"frontier-{JUDGE}.png", f"quality-{JUDGE}.png", "report.html", "training.png"]


def test_what_it_says(reported: Path) -> None:
    text = Tags((reported / "out" / "report.html").read_text()).text
    assert "3.2500 ± 0.0625" in text and "1,234" in text and "17" in text
    assert "none: the data's entropy is outside what the temperatures reach" in text
    assert "119 updates" in text and "not found" in text


def test_runs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds neither an evaluation"):
        read_runs(tmp_path)


def test_a_training_run_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "grad_norm": 0.1}\n')
    page = write_report([tmp_path], tmp_path / "out", 3).read_text()
    assert "not evaluated" in page and page.count("<img") == 1
