"""Perplexity and entropy against values computed by hand, and the files and tables made of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.evaluate.metrics import generative_perplexity, unigram_entropy
from imdm_scale.evaluate.ngram import NgramEvaluator
from imdm_scale.evaluate.quality import plot_quality, quality_table, render_table, show_samples, write_json

BOS, EOS = 1, 2


class Fixed:
    """An evaluator that gives position i the negative log-likelihood 10^-i: the mean shows which counted."""

    eos_id = EOS

    def log_probs(self, ids_BL):
        return np.tile(-(10.0 ** -np.arange(1, ids_BL.shape[1])), (len(ids_BL), 1))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([BOS, 5, 6, 7], 0.111 / 3),
        ([BOS, 5, EOS, 7], 0.111 / 3),
        ([BOS, EOS, 6, EOS], 0.11 / 2),
        ([BOS, EOS, EOS, EOS], 0.1),
        ([EOS, 5, EOS, EOS], 0.1),
        ([EOS, EOS, 6, 7], 0.011 / 2),
    ],
    ids=[
        "no EOS",
        "the first EOS counts",
        "later ones do not",
        "padding",
        "BOS = EOS is the first",
        "then none",
    ],
)
def test_which_tokens_perplexity_counts(row, expected):
    assert generative_perplexity(Fixed(), np.array([row])) == pytest.approx(np.exp(expected))


def test_perplexity_is_a_mean_over_tokens_not_over_samples():
    ids_BL = torch.tensor([[BOS, 5, 6, 7], [BOS, EOS, EOS, EOS]])
    assert generative_perplexity(Fixed(), ids_BL) == pytest.approx(np.exp((0.111 + 0.1) / 4))
    with pytest.raises(ValueError, match="no token"):
        generative_perplexity(Fixed(), np.array([[EOS, EOS]]))


def test_entropy_by_hand():
    assert unigram_entropy(np.array([[3, 3, 3, 3]])) == 0
    assert unigram_entropy(np.array([[3, 9, 4, 1]])) == pytest.approx(np.log(4))
    half = 0.5 * np.log(2) + 2 * 0.25 * np.log(4)
    assert unigram_entropy(torch.tensor([[8, 3, 8, 1]])) == pytest.approx(half)
    # Equal ids at the border of two rows are two runs.
    assert unigram_entropy(np.array([[3, 3, 5, 5], [5, 5, 5, 5]])) == pytest.approx(np.log(2) / 2)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(None)


@pytest.fixture(scope="module")
def quality_and_samples(tokenizer):
    text = tokenizer.encode("It was the best of times, it was the worst of times [bold]indeed[/bold]. ")[:20]
    data = np.array([[BOS, *text, EOS]] * 3)
    generator = np.random.default_rng(0)
    noise = generator.integers(3, tokenizer.mask_id, data.shape)
    samples = {"teacher": {2: noise, 16: data}, "student": {16: data, 4: data[:, ::-1], 2: noise}}
    evaluator = NgramEvaluator.fit(data, tokenizer.vocab_size, eos_id=EOS)
    return quality_table(samples, data, evaluator), samples


def test_table_has_the_promised_form(quality_and_samples):
    quality, samples = quality_and_samples
    assert set(quality) == {"teacher", "student", "data", "evaluator"}
    assert list(quality["student"]) == ["2", "4", "16"]
    assert list(quality["teacher"]) == ["2", "16"]
    assert quality["teacher"]["16"] == quality["data"]
    assert quality["teacher"]["2"]["perplexity"] > quality["data"]["perplexity"]
    assert quality["data"]["entropy"] == unigram_entropy(samples["teacher"][16])
    assert "Kneser-Ney" in quality["evaluator"]


def printed(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


def test_table_is_printed_with_every_figure(quality_and_samples):
    quality, _ = quality_and_samples
    shown = printed(render_table(quality))
    rows = {
        cells[0]: cells for line in shown.splitlines() if len(cells := line.replace("│", " ").split()) == 5
    }
    assert {"2", "16", "data"} <= set(rows)
    assert rows["data"][1] == rows["data"][2] == f"{quality['data']['perplexity']:.2f}"
    assert rows["16"][3] == f"{quality['teacher']['16']['entropy']:.2f}"
    assert "Kneser-Ney" in shown


def test_samples_are_printed_as_they_are(quality_and_samples, tokenizer):
    _, samples = quality_and_samples
    shown = printed(show_samples(samples, 16, tokenizer, count=2))
    assert "teacher, 16 steps" in shown
    assert "student, 16 steps" in shown
    assert shown.count("the worst of times [bold]") == 4


def test_files(quality_and_samples, tmp_path):
    quality, _ = quality_and_samples
    write_json(quality, tmp_path / "quality.json")
    assert json.loads((tmp_path / "quality.json").read_text()) == quality
    plot_quality(quality, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file is left"
