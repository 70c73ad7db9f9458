"""Tokens from uniforms: exact steps of the CDF, frequencies, rare tokens, nucleus.

Statistical tests use fixed seeds; a correct program with a new seed would fail each with probability 1e-4.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion import inverse_cdf as module
from imdm_scale.diffusion.inverse_cdf import inverse_cdf
from imdm_scale.diffusion.likelihood import forbid_mask
from imdm_scale.diffusion.noise import Purpose, uniform

FALSE_ALARM = 1e-4
LAST_U = 1.0 - 2.0**-53

# Rare tokens after a common one: float32, whose steps near 0.9 are 6e-8, misplaces or loses them.
RARE = [0.9, 1e-7, 3e-7, 1e-6, 1e-5, 1e-7, 0.05, 1e-5, 2e-7, 0.04, 1e-6]
RARE.append(1.0 - sum(RARE))


def log(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def draws(n: int, seed: int = 0) -> torch.Tensor:
    return uniform(seed, torch.arange(n), Purpose.TOKEN, 0, 1, dtype=torch.float64).flatten()


def test_the_token_changes_exactly_at_the_steps_of_the_cdf():
    steps = [float(sum(map(Fraction, RARE[: k + 1]))) for k in range(len(RARE) - 1)]
    below = torch.tensor(steps, dtype=torch.float64) - 1e-13
    above = torch.tensor(steps, dtype=torch.float64) + 1e-13
    logits = log(RARE).expand(len(steps), -1)
    ids = torch.arange(len(steps))
    assert torch.equal(inverse_cdf(logits, below), ids)
    assert torch.equal(inverse_cdf(logits, above), ids + 1)
    # The same points tell a float32 cumulative sum apart.
    single = log(RARE).float().softmax(-1).cumsum(-1)
    wrong = (torch.searchsorted(single, below.float(), right=True) != ids).sum()
    assert wrong >= 3


def test_a_step_of_the_cdf_belongs_to_the_next_token():
    """A token owns [start, end): with four equal ones u = 1/4 is the second's."""
    u = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert inverse_cdf(torch.zeros(4, 4), u).tolist() == [0, 1, 2, 3]


def test_frequencies_follow_the_distribution_down_to_rare_tokens():
    n = 3_000_000
    counts = torch.bincount(inverse_cdf(log(RARE).expand(n, -1), draws(n)), minlength=len(RARE)).double()
    expected = n * torch.tensor(RARE, dtype=torch.float64)
    common = expected >= 5
    assert int(common.sum()) >= 6
    pooled = [torch.cat([x[common], x[~common].sum()[None]]).numpy() for x in (counts, expected)]
    assert stats.chisquare(*pooled).pvalue > FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_follow_the_logits_of_any_type(dtype):
    logits = torch.linspace(-3, 2, 12).roll(5).to(dtype)
    n = 200_000
    for temperature in (1.0, 0.7):
        counts = torch.bincount(
            inverse_cdf(logits.expand(n, -1), draws(n, 1), temperature=temperature), minlength=12
        )
        law = (logits.double() / temperature).softmax(-1)
        assert stats.chisquare(counts.numpy(), (n * law).numpy()).pvalue > FALSE_ALARM


def test_an_impossible_token_never_appears():
    logits = torch.tensor([[-1e6, -1e6, 0.0, -1e6, 1.0, -1e6]])
    u = torch.cat([torch.tensor([0.0, LAST_U], dtype=torch.float64), draws(10_000)])
    ids = inverse_cdf(logits.expand(len(u), -1), u)
    assert ids[0].item() == 2 and ids[1].item() == 4
    assert set(ids.tolist()) == {2, 4}
    wide = forbid_mask(torch.zeros(2, 50_000), 49_999)
    assert inverse_cdf(wide, torch.tensor([0.0, LAST_U], dtype=torch.float64)).tolist() == [0, 49_998]


def test_chunks_do_not_change_the_result(monkeypatch):
    logits = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    whole = inverse_cdf(logits, draws(37), top_p=0.8)
    monkeypatch.setattr(module, "MAX_ELEMENTS", 50)
    assert torch.equal(inverse_cdf(logits, draws(37), top_p=0.8), whole)
    assert inverse_cdf(logits[:0], draws(0)).shape == (0,)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(weights, top_p):
    p = torch.tensor(weights, dtype=torch.float64).log().softmax(-1)
    order = sorted(range(len(weights)), key=lambda token: -p[token].item())
    nucleus: list[int] = []
    mass = 0.0
    while mass < top_p and len(nucleus) < len(weights):
        nucleus.append(order[len(nucleus)])
        mass += p[nucleus[-1]].item()
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ids = inverse_cdf(p.log().expand(len(u), -1), u, top_p=top_p)
    assert set(ids.tolist()) == set(nucleus)
    counts = torch.bincount(ids, minlength=len(weights)).double() / len(u)
    law = torch.tensor([p[v].item() / mass if v in nucleus else 0.0 for v in range(len(weights))])
    assert (counts - law).abs().max() <= 1.01 / len(u) + 1e-6


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_ids_grow_with_u(row):
    u = torch.linspace(0, LAST_U, 200, dtype=torch.float64)
    ids = inverse_cdf(torch.tensor(row).expand(200, -1), u)
    assert bool((ids.diff() >= 0).all())
