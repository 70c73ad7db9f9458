"""The three-way reverse posterior against algebra and against the forward chain itself.

The simulation has a fixed seed; with a new one a correct program would fail with probability 1e-4.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion.posterior import reverse_masses, reverse_posterior
from imdm_scale.diffusion.schedule import alpha

FALSE_ALARM = 1e-4


def masses(t, s):
    return reverse_masses(
        alpha(torch.tensor(t, dtype=torch.float64)), alpha(torch.tensor(s, dtype=torch.float64))
    )


times = st.lists(st.floats(1e-3, 1.0), min_size=3, max_size=3, unique=True).map(sorted)


@settings(max_examples=200)
@given(times)
def test_masses_are_probabilities_and_compose(times):
    r, s, t = times
    step = masses(t, s)
    assert sum(step).item() == pytest.approx(1.0, abs=1e-12)
    assert min(step).item() >= 0.0
    still_masked = (1 - alpha(torch.tensor(s))) / (1 - alpha(torch.tensor(t)))
    assert (step.keep + step.reset).item() == pytest.approx(still_masked.item(), rel=1e-4)
    # Two steps keep e exactly as often as one long step does, and leave as many masks.
    second, long = masses(s, r), masses(t, r)
    assert (step.keep * second.keep).item() == pytest.approx(long.keep.item(), rel=1e-9)
    two_steps = (step.keep + step.reset) * (second.keep + second.reset)
    assert two_steps.item() == pytest.approx((long.keep + long.reset).item(), rel=1e-9)


@pytest.mark.parametrize("t", [1e-3, 0.5, 1.0])
def test_the_last_step_reveals_everything(t):
    assert [mass.item() for mass in masses(t, 0.0)] == [1.0, 0.0, 0.0]


@settings(max_examples=50)
@given(times, st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_the_posterior_sums_to_one(times, weights):
    _, s, t = (alpha(torch.tensor([time], dtype=torch.float64)) for time in times)
    probs = torch.tensor([weights], dtype=torch.float64)
    law = reverse_posterior(probs / probs.sum(), t, s)
    assert law.shape == (1, 6)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(law[:, :4] / law[:, :4].sum(), probs / probs.sum())


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.5), (1.0, 0.875), (0.3, 0.05)])
def test_the_posterior_agrees_with_the_forward_chain(t, s):
    """Run the chain 0 -> s -> t with explicit e, condition on (m, e) at t, and count what stood at s."""
    generator = torch.Generator().manual_seed(1)
    n = 1_000_000
    alpha_s, alpha_t = (alpha(torch.tensor(time, dtype=torch.float64)).item() for time in (s, t))

    def draw() -> torch.Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    p_0 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    x_0 = torch.multinomial(p_0, n, replacement=True, generator=generator)
    masked_s = draw() >= alpha_s
    e_s = draw()
    survives = draw() < alpha_t / alpha_s
    e_t = torch.where(survives & masked_s, e_s, draw())
    masked_t = masked_s | ~survives
    # 0, 1, 2: the token at s; 3: masked with the e seen at t; 4: masked with another e.
    state_s = torch.where(masked_s, torch.where(e_s == e_t, 3, 4), x_0)[masked_t]
    law = reverse_posterior(p_0[None], torch.tensor([alpha_t]).double(), torch.tensor([alpha_s]).double())[0]
    counts = torch.bincount(state_s, minlength=5)
    expected = law / law.sum() * counts.sum()
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > FALSE_ALARM
