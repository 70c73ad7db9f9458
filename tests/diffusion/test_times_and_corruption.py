"""Times of a batch, and the forward process.

Statistical tests use fixed seeds; a correct program with a new seed would fail each with probability 1e-4.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.schedule import EPS0, alpha, nelbo_weight, stratified_times

FALSE_ALARM = 1e-4
MASK = 9


def widest_gap(t: torch.Tensor) -> float:
    """Widest gap between times on the circle."""
    t = t.sort().values
    return float(torch.cat([t.diff(), t[:1] + 1 - t[-1:]]).max())


def test_schedule_and_weight_belong_together():
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64, requires_grad=True)
    (rate,) = torch.autograd.grad(alpha(t).sum(), t)
    assert torch.allclose(-rate / (1 - alpha(t)), nelbo_weight(t), rtol=1e-12)
    assert alpha(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(EPS0, rel=1e-12)


@settings(max_examples=60)
@given(n=st.integers(1, 300), step=st.integers(0, 10**9), seed=st.integers(0, 2**63), data=st.data())
def test_one_sample_per_stratum_whatever_the_split(n, step, seed, data):
    t = stratified_times(seed, step, n)
    assert t.dtype == torch.float64 and bool(((t >= 1e-3) & (t < 1)).all())
    strata = ((t - 1e-3) / (1 - 1e-3) * n + 1e-9).long()
    assert strata.sort().values.tolist() == list(range(n))
    first = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - first))
    assert torch.equal(stratified_times(seed, step, n, first=first, count=count), t[first : first + count])


@pytest.mark.parametrize("n", [16, 48, 128, 512])
def test_every_micro_batch_covers_the_range(n):
    """Contiguous micro-batches leave gaps of at most 2/m, strided ones (to 7) of 4/m, plus two strata."""
    for step in range(5):
        t = stratified_times(7, step, n)
        for m in (4, 8, 16):
            for start in range(n - m + 1):
                assert widest_gap(t[start : start + m]) <= 2 / m + 2 / n
            for stride in range(2, 8):
                for start in range(n - stride * (m - 1)):
                    assert widest_gap(t[start : start + stride * m : stride]) <= 4 / m + 2 / n


def test_a_slots_times_are_uniform_over_the_steps():
    t = torch.stack([stratified_times(1, step, 8) for step in range(1500)])
    for slot in (0, 5):
        u = (t[:, slot] - 1e-3) / (1 - 1e-3)
        assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM


def test_slots_outside_the_batch_are_refused():
    with pytest.raises(ValueError, match="outside a batch of 8"):
        stratified_times(0, 0, 8, first=4, count=5)


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0])
def test_the_masked_share_is_one_minus_alpha(t):
    x_0 = torch.arange(8).repeat(400, 32)
    x_t = corrupt(x_0, torch.full((400,), t, dtype=torch.float64), MASK, 3, torch.arange(400), 0)
    masked = x_t == MASK
    assert torch.equal(x_t[~masked], x_0[~masked])
    test = stats.binomtest(int(masked.sum()), masked.numel(), (1 - EPS0) * t)
    assert test.pvalue > FALSE_ALARM


def test_corruption_is_nested_in_time_and_the_same_on_any_split():
    x_0 = torch.zeros(6, 40, dtype=torch.int64)
    ids = torch.arange(6) + 2**35
    masked = [
        corrupt(x_0, torch.full((6,), t, dtype=torch.float64), MASK, 3, ids, 2) == MASK for t in (0, 0.2, 0.6)
    ]
    assert not masked[0].any() and masked[1].any()
    assert bool((masked[1] <= masked[2]).all()) and not torch.equal(masked[1], masked[2])
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    whole = corrupt(x_0, t, MASK, 3, ids, 2)
    assert torch.equal(corrupt(x_0[2:4], t[2:4], MASK, 3, ids[2:4], 2), whole[2:4])


def test_fixed_positions_are_never_masked_and_change_nothing_else():
    x_0 = torch.zeros(6, 40, dtype=torch.int64)
    t = torch.full((6,), 0.9, dtype=torch.float64)
    fixed = torch.arange(240).view(6, 40) % 3 == 0
    free = corrupt(x_0, t, MASK, 3, torch.arange(6), 2)
    given_kept = corrupt(x_0, t, MASK, 3, torch.arange(6), 2, fixed_BL=fixed)
    assert bool((given_kept[fixed] == 0).all()) and bool((free[fixed] == MASK).any())
    assert torch.equal(given_kept[~fixed], free[~fixed])
