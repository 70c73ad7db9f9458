"""Interpolation on the frontier; P points, S samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.evaluate.folder import Cell
from imdm_scale.evaluate.frontier import FrontierPoint, matched_perplexity, perplexity_at
from imdm_scale.evaluate.metrics import SampleScores
from imdm_scale.evaluate.scores import frontier_figures, text_figures


def test_by_hand() -> None:
    entropies_P, perplexities_P = np.array([4.0, 3.0, 3.5]), np.array([800.0, 100.0, 200.0])
    assert perplexity_at(3.5, entropies_P, perplexities_P) == pytest.approx(200)
    assert perplexity_at(3.75, entropies_P, perplexities_P) == pytest.approx(400), "the geometric mean"
    assert perplexity_at(3.0, entropies_P, perplexities_P) == pytest.approx(100)
    assert perplexity_at(2.999, entropies_P, perplexities_P) is None, "nothing is extrapolated"
    assert perplexity_at(4.001, entropies_P, perplexities_P) is None


def test_points_of_one_entropy() -> None:
    assert perplexity_at(3.0, np.array([3.0, 3.0]), np.array([100.0, 400.0])) == pytest.approx(200)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(1, 1e4)), min_size=2, max_size=6),
    st.floats(0, 5),
)
def test_between_the_neighbours(points: list[tuple[float, float]], entropy: float) -> None:
    entropies_P, perplexities_P = map(np.array, zip(*points, strict=True))
    found = perplexity_at(entropy, entropies_P, perplexities_P)
    if not entropies_P.min() <= entropy <= entropies_P.max():
        assert found is None
    else:
        assert perplexities_P.min() * (1 - 1e-9) <= found <= perplexities_P.max() * (1 + 1e-9)


def point(mean_entropy: float, perplexity: float, spread: float = 0.02) -> FrontierPoint:
    noise_S = np.random.default_rng(0).normal(size=50)
    noise_S -= noise_S.mean()
    nll_S = 10 * np.log(perplexity) + 5 * noise_S
    return FrontierPoint(mean_entropy + spread * noise_S, SampleScores(nll_S, np.full(50, 10)))


def test_the_interval_moves_with_both() -> None:
    points = [point(3.0, 100.0), point(4.0, 400.0)]
    found = matched_perplexity(points, 3.5)
    assert found.value == pytest.approx(200) and found.low < 200 < found.high
    edge = matched_perplexity(points, 3.0001)
    assert edge.value == pytest.approx(100, rel=1e-3)
    assert (edge.low, edge.high) == (None, None), "some replicates do not reach it"
    assert matched_perplexity(points, 4.5) is None


def test_figures_say_what_is_reached() -> None:
    points = {
        Cell(1, 1.0): point(3.0, 100.0),
        Cell(1, 0.5): point(2.0, 50.0),
        Cell(4, 1.0): point(3.9, 90.0),
    }
    figures = frontier_figures(points, 3.5)
    assert figures["1"]["perplexity"] is None and figures["4"]["perplexity"] is None
    assert figures["1"]["temperatures"] == [0.5, 1.0]
    assert (figures["1"]["lowest_entropy"], figures["1"]["highest_entropy"]) == pytest.approx((2.0, 3.0))


def test_groups_widen_the_interval_and_move_nothing() -> None:
    """Ten groups of five equal texts are ten texts."""
    ids_SL = np.random.default_rng(2).integers(0, 9, (10, 12)).repeat(5, axis=0)
    scores = SampleScores(np.arange(1.0, 11.0).repeat(5), np.full(50, 4))
    alone, grouped = text_figures(ids_SL, scores), text_figures(ids_SL, scores, each=5)
    of_ten = text_figures(ids_SL[::5], SampleScores(scores.nll_S[::5], scores.targets_S[::5]))
    for metric in ("perplexity", "entropy"):
        assert grouped[metric] == pytest.approx(of_ten[metric])
        assert grouped[metric]["value"] == pytest.approx(alone[metric]["value"])
        assert grouped[metric]["high"] > alone[metric]["high"]
