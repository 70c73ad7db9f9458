"""MAUVE as the package is asked for it; without the package one sentence."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from imdm_scale.errors import UserError
from imdm_scale.evaluate.mauve_score import SEEDS, MauveScorer, load_package


def fake(seen: list) -> types.ModuleType:
    """Features that are lengths of texts; scores that tell the seed and both features."""
    module = types.ModuleType("mauve.compute_mauve")

    def get_features_from_input(
        features, tokens, texts, featurize_model_name, max_len, device_id, name, batch_size
    ):
        seen.append((name, featurize_model_name, max_len, device_id))
        if "gpt2" not in featurize_model_name:
            raise ValueError(f"Unknown model: {featurize_model_name}")
        return np.array([[len(text)] for text in texts])

    def compute_mauve(p_features, q_features, seed, verbose):
        return types.SimpleNamespace(mauve=0.001 * seed + p_features.sum() + q_features.sum())

    module.get_features_from_input = get_features_from_input
    module.compute_mauve = compute_mauve
    return module


def test_the_mean_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    monkeypatch.setitem(sys.modules, "mauve", types.ModuleType("mauve"))
    monkeypatch.setitem(sys.modules, "mauve.compute_mauve", fake(seen))
    scorer = MauveScorer(["a", "bc"], "gpt2-large", 100, -1)
    found = scorer.score(["def"])
    assert found.value == pytest.approx(6 + 0.001 * np.mean(SEEDS))
    assert found.deviation == pytest.approx(0.001 * np.std(SEEDS, ddof=1))
    scorer.score(["gh"])
    assert seen == [(name, "gpt2-large", 100, -1) for name in ("human", "sampled", "sampled")], (
        "human texts once"
    )
    with pytest.raises(UserError, match="--mauve-model is llama"):
        MauveScorer(["a"], "llama", 100, -1)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UserError, match=r"needs the package mauve-text.*pip install 'imdm_scale\[eval\]'"):
        load_package()
