"""Coupled sampling has the law of ancestral sampling, against exact enumeration.

The teacher knows a Markov chain of four positions over three tokens: at every masked position it gives the exact
conditional law, given whatever is revealed. All its states, (3 + 1)^4, are enumerated, and so is the law of the
text after N steps: between t and s each masked position is revealed with probability (t - s)/t, with tokens that are
independent given the state. In few steps this is not the chain's own law.

Chi-square tests of 2e5 samples, with fixed seeds: a correct program with a new seed would fail each with
probability 1e-4.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from imdm_scale.diffusion.coupling import coordinates, trajectory
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.sampler import SamplerSettings, draw_tokens, sample

VOCAB, LENGTH, MASK = 3, 4, 3
NUM_SAMPLES = 200_000
FALSE_ALARM = 1e-4
BASE = torch.tensor([(VOCAB + 1) ** (LENGTH - 1 - i) for i in range(LENGTH)])
STATES_SL = torch.tensor(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)))
TEXTS = (STATES_SL != MASK).all(-1)


def joint_law() -> torch.Tensor:
    """The chain's law of every text, (texts,) in float64."""
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    chain = torch.tensor([[0.85, 0.1, 0.05], [0.1, 0.2, 0.7], [0.45, 0.5, 0.05]], dtype=torch.float64)
    texts_XL = STATES_SL[TEXTS]
    joint_X = start[texts_XL[:, 0]]
    for i in range(1, LENGTH):
        joint_X = joint_X * chain[texts_XL[:, i - 1], texts_XL[:, i]]
    return joint_X


JOINT_X = joint_law()


def conditional_laws() -> torch.Tensor:
    """p(x_i = v | what the state reveals), (states, L, V) in float64."""
    texts_XL = STATES_SL[TEXTS]
    agree_SX = ((STATES_SL[:, None] == MASK) | (STATES_SL[:, None] == texts_XL)).all(-1)
    weights_SX = agree_SX * JOINT_X
    one_hot_XLV = torch.nn.functional.one_hot(texts_XL, VOCAB).double()
    return torch.einsum("sx,xlv->slv", weights_SX, one_hot_XLV) / weights_SX.sum(-1)[:, None, None]


LAWS_SLV = conditional_laws()


def step_matrix(reveal: float) -> torch.Tensor:
    """Law of the next state given the state, (states, states), where masked positions are revealed with this
    probability."""
    matrix = torch.ones(len(STATES_SL), len(STATES_SL), dtype=torch.float64)
    for i in range(LENGTH):
        now_S1, then_1S = STATES_SL[:, None, i], STATES_SL[None, :, i]
        token_SS = LAWS_SLV[:, i][:, then_1S[0].clamp(max=VOCAB - 1)] * reveal
        from_mask_SS = torch.where(then_1S == MASK, 1.0 - reveal, token_SS)
        matrix *= torch.where(now_S1 == MASK, from_mask_SS, (now_S1 == then_1S).double())
    return matrix


def text_law(first_state: list[int], num_steps: int) -> torch.Tensor:
    """Exact probability of every text after ancestral sampling from a state, (texts,)."""
    law_S = (torch.tensor(first_state) == STATES_SL).all(-1).double()
    for i in range(num_steps):
        t, s = 1.0 - i / num_steps, 1.0 - (i + 1) / num_steps
        law_S = law_S @ step_matrix((t - s) / t)
    assert law_S[~TEXTS].sum() < 1e-12 and abs(law_S.sum() - 1.0) < 1e-12
    return law_S[TEXTS]


def predict(x_BL: torch.Tensor, noise_BLD: torch.Tensor) -> torch.Tensor:
    logits_SLV = torch.nn.functional.pad(LAWS_SLV.log(), (0, 1))
    return logits_SLV[(x_BL * BASE).sum(-1)]


def pvalue(first_state: list[int], law: torch.Tensor, settings: SamplerSettings, **options) -> float:
    x_0_BL = sample(
        predict,
        torch.tensor(first_state).expand(NUM_SAMPLES, -1),
        settings=settings,
        sample_ids_B=torch.arange(NUM_SAMPLES),
        mask_id=MASK,
        noise_dim=2,
        **({"seed": 17} | options),
    )
    place = torch.full((len(STATES_SL),), -1).masked_scatter(TEXTS, torch.arange(int(TEXTS.sum())))
    counts = torch.bincount(place[(x_0_BL * BASE).sum(-1)], minlength=len(law))
    expected = law * NUM_SAMPLES
    common = expected >= 5
    assert counts[expected == 0].sum() == 0
    pooled = [torch.cat([x[common], x[~common].sum()[None]]).double() for x in (counts, expected)]
    filled = pooled[1] > 0
    return float(stats.chisquare(*(x[filled].numpy() for x in pooled)).pvalue)


START = [MASK] * LENGTH


@pytest.mark.parametrize("sampler", ["coupled", "ancestral"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_the_law_of_the_text_is_the_enumerated_one(sampler, num_steps):
    assert (
        pvalue(START, text_law(START, num_steps), SamplerSettings(num_steps, sampler=sampler)) > FALSE_ALARM
    )


@pytest.mark.parametrize(("kind", "scale"), [("uniform", 3.0), ("normal", 0.5)])
def test_whatever_the_law_of_the_noise(kind, scale):
    settings = SamplerSettings(3, sampler="coupled")
    law = text_law(START, 3)
    assert pvalue(START, law, settings, noise_kind=kind, noise_scale=scale) > FALSE_ALARM


@pytest.mark.parametrize("start_time", [0.2, 0.7])
def test_from_a_later_state_too(start_time):
    first = [MASK, 1, MASK, MASK]
    law = text_law(first, 3)
    settings = SamplerSettings(3, sampler="coupled")
    assert pvalue(first, law, settings, start_time=start_time) > FALSE_ALARM


def test_the_test_would_see_another_number_of_steps():
    """Neighbouring laws are far apart for it, so that its passing says something."""
    settings = SamplerSettings(3, sampler="coupled")
    for num_steps in (1, 2, 4):
        assert pvalue(START, text_law(START, num_steps), settings) < 1e-12


@pytest.mark.parametrize("grid", ["order", "position"])
def test_one_position_at_a_time_has_the_chains_own_law(grid):
    """As many steps as positions, each its own: the limit of ancestral sampling in infinitely many steps."""
    noise = coordinates(mask_noise(23, torch.arange(NUM_SAMPLES), 0, LENGTH, 2))

    def tokens(x_BL, positions_N, u_N):
        logits_NV = predict(x_BL, torch.empty(0)).flatten(0, 1)[positions_N]
        return draw_tokens(logits_NV, u_N, mask_id=MASK)

    start_BL = torch.full((NUM_SAMPLES, LENGTH), MASK)
    times_B = torch.ones(NUM_SAMPLES, dtype=torch.float64)
    x_0_BL = trajectory(tokens, start_BL, noise, times_B, LENGTH, mask_id=MASK, grid=grid)
    powers = torch.tensor([VOCAB ** (LENGTH - 1 - i) for i in range(LENGTH)])
    counts = torch.bincount((x_0_BL * powers).sum(-1), minlength=VOCAB**LENGTH)
    expected = JOINT_X * NUM_SAMPLES
    assert expected.min() > 5
    assert stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue > FALSE_ALARM
    in_three = text_law(START, 3) * NUM_SAMPLES
    assert stats.chisquare(counts.double().numpy(), in_three.numpy()).pvalue < 1e-12
