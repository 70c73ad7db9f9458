"""Tokens from uniforms: integer weights, steps of the CDF, frequencies, rare tokens, nucleus.

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
from imdm_scale.diffusion.inverse_cdf import WEIGHT_BITS, argmax, integer_weights, inverse_cdf, keep_nucleus
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


def test_the_exponential_of_a_number_does_not_depend_on_its_place():
    """Not in a vector lane, nor in a tail, nor beside what overflows: all that a cut vocabulary rests on."""
    generator = torch.Generator().manual_seed(0)
    x = -50 * torch.rand(2**15, generator=generator, dtype=torch.float64)
    expected = x.exp()
    special = torch.tensor([-1e6, -torch.inf, -745.0, -708.5, 0.0], dtype=torch.float64)
    for width in [*range(1, 70), 255, 256, 257, 1000, 1023]:
        for first in (0, 1, 3, 8):
            row, right = (
                x[first : first + 8 * width].view(8, -1),
                expected[first : first + 8 * width].view(8, -1),
            )
            assert torch.equal(row.exp(), right)
            assert torch.equal(row[:, width // 2 :].exp(), right[:, width // 2 :])
            assert torch.equal(row.t().exp(), right.t())
            among = torch.rand(row.shape, generator=generator) < 0.3
            mixed = row.clone()
            mixed[among] = special[torch.arange(int(among.sum())) % len(special)]
            assert torch.equal(mixed.exp()[~among], right[~among])


def test_integer_weights_are_the_softmax_to_the_stated_distance():
    logits = 12 * torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.where(torch.arange(50_000) == 7, 0.0, -31.0)  # almost half a unit each
    weights = integer_weights(logits)
    assert weights.dtype == torch.int64 and bool((weights.amax(-1) == 2**WEIGHT_BITS).all())
    law = logits.double().softmax(-1)
    distance = (weights.double() / weights.sum(-1, keepdim=True) - law).abs().sum(-1) / 2
    assert bool((distance <= 50_000 * 2.0 ** -(WEIGHT_BITS + 1)).all())
    assert distance.max() > 1e-10
    flat = integer_weights(torch.zeros(1, 2**18))
    assert flat.sum().item() == 2**62


@settings(max_examples=200)
@given(
    row=st.lists(st.one_of(st.floats(-20, 20), st.just(-1e6), st.just(0.0)), min_size=1, max_size=30),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_a_plain_cumulative_sum_away_from_its_steps(row, temperature, seed):
    logits = torch.tensor(row)
    u = torch.cat([torch.tensor([0.0, LAST_U], dtype=torch.float64), draws(200, seed)])
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cdf, u, right=True)
    clear = (cdf - u[:, None]).abs().amin(-1) > 1e-9
    ids = inverse_cdf(logits.expand(len(u), -1), u, temperature=temperature)
    assert torch.equal(ids[clear], expected[clear])
    assert int(clear.sum()) >= 200


def test_the_token_changes_exactly_at_the_steps_of_the_cdf():
    steps = [float(sum(map(Fraction, RARE[: k + 1]))) for k in range(len(RARE) - 1)]
    below = torch.tensor(steps, dtype=torch.float64) - 1e-12
    above = torch.tensor(steps, dtype=torch.float64) + 1e-12
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


def test_a_row_with_nan_gives_an_id_and_leaves_the_others_alone():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 4] = torch.nan
    for top_p in (1.0, 0.5):
        ids = inverse_cdf(broken, draws(3), top_p=top_p)
        assert 0 <= ids[1].item() < 9
        assert torch.equal(ids[[0, 2]], inverse_cdf(logits, draws(3), top_p=top_p)[[0, 2]])


def test_argmax_is_the_lowest_of_the_most_likely_ids():
    logits = torch.tensor([[0.0, 2.0, 2.0], [-1e6, -2e6, -1e6], [1.0, 1.0, 1.5]])
    assert argmax(logits).tolist() == [1, 0, 2]
    assert argmax(logits.bfloat16()).tolist() == [1, 0, 2]


def test_chunks_do_not_change_the_result(monkeypatch):
    logits = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    whole = inverse_cdf(logits, draws(37), top_p=0.8)
    monkeypatch.setattr(module, "MAX_ELEMENTS", 50)
    assert torch.equal(inverse_cdf(logits, draws(37), top_p=0.8), whole)
    assert inverse_cdf(logits[:0], draws(0)).shape == (0,)


@settings(max_examples=100)
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


@settings(max_examples=300)
@given(
    weights=st.lists(
        st.one_of(st.integers(0, 5), st.integers(0, 2**WEIGHT_BITS), st.just(2**WEIGHT_BITS)),
        min_size=1,
        max_size=12,
    ).filter(any),
    top_p=st.one_of(st.floats(1e-9, 1.0), st.sampled_from([0.25, 0.5, 0.75])),
)
def test_the_nucleus_of_integer_weights_is_that_of_a_sort(weights, top_p):
    nucleus: set[int] = set()
    target = Fraction(top_p * float(sum(weights)))  # as float64 has it: what is meant by reaching top_p
    for token in sorted(range(len(weights)), key=lambda token: (-weights[token], token)):
        if sum(weights[kept] for kept in nucleus) >= min(target, sum(weights)):
            break
        nucleus.add(token)
    kept = keep_nucleus(torch.tensor([weights]), top_p)
    assert kept.tolist() == [[weight if v in nucleus else 0 for v, weight in enumerate(weights)]]


@settings(max_examples=50)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_ids_grow_with_u(row):
    u = torch.linspace(0, LAST_U, 200, dtype=torch.float64)
    ids = inverse_cdf(torch.tensor(row).expand(200, -1), u)
    assert bool((ids.diff() >= 0).all())
