"""Noise coupling: coordinates, trajectories and the labels and states that they give.

The law of coupled sampling is compared with ancestral sampling's in test_coupled_law.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion.coupling import (
    Coordinates,
    coordinates,
    corrupt_coupled,
    noise_of_masked,
    progressive_labels,
    rollout,
    trajectory,
    trajectory_labels,
)
from imdm_scale.diffusion.noise import Purpose, mask_noise, uniform
from imdm_scale.diffusion.sampler import SamplerSettings, draw_tokens, sample
from imdm_scale.diffusion.schedule import stratified_times

BATCH, LENGTH, VOCAB, MASK, DIM = 12, 20, 9, 8, 3
IDS = torch.arange(BATCH) + 100
MIX = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
READ = torch.randn(DIM, VOCAB, generator=torch.Generator().manual_seed(1))
NOISE = mask_noise(9, IDS, 0, LENGTH, DIM)
COORDINATES = coordinates(NOISE)
ALL_MASKED = torch.full((BATCH, LENGTH), MASK)
TIMES = st.one_of(st.sampled_from([0.0, 1.0, 0.3, 1e-3]), st.floats(0.0, 1.0))


def network(x_BL: torch.Tensor, noise_BLD: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, V) that depend on the neighbours, and on the noise of masked positions."""
    one_hot = torch.nn.functional.one_hot(x_BL, VOCAB).float()
    context = one_hot + one_hot.roll(1, 1) + one_hot.roll(-1, 1)
    return context @ MIX + (x_BL == MASK)[..., None] * (noise_BLD @ READ)


class Teacher:
    """Tokens from the network's logits; remembers the positions that it was asked for."""

    def __init__(self, noise_BLD: torch.Tensor = NOISE, greedy: bool = False) -> None:
        self.noise_BLD, self.greedy = noise_BLD, greedy
        self.asked: list[torch.Tensor] = []

    def __call__(self, x_BL, positions_N, u_N):
        self.asked.append(positions_N)
        logits_NV = network(x_BL, self.noise_BLD).flatten(0, 1)[positions_N]
        return draw_tokens(logits_NV, u_N, mask_id=MASK, greedy=self.greedy)


def text() -> torch.Tensor:
    return torch.randint(VOCAB - 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def sampled(settings: SamplerSettings, x_t=ALL_MASKED, ids=IDS, **options) -> torch.Tensor:
    names = {"seed": 9, "sample_ids_B": ids, "mask_id": MASK, "noise_dim": DIM} | options
    return sample(network, x_t[: len(ids)], settings=settings, **names)


@pytest.mark.parametrize("scale", [1.0, 0.5, 4.0])
def test_uniform_noise_gives_back_its_uniforms_bit_for_bit(scale):
    noise = mask_noise(3, IDS, 5, 300, 4, scale=scale)
    u_BLD = uniform(3, IDS, Purpose.MASK_NOISE, 5, 300, 2)
    for found, drawn in zip(coordinates(noise, scale=scale), u_BLD.unbind(-1), strict=True):
        assert found.dtype == torch.float64 and torch.equal(found, drawn.double())


@pytest.mark.parametrize(("kind", "scale"), [("uniform", 3.0), ("normal", 1.0), ("normal", 0.3)])
def test_other_laws_give_independent_uniforms(kind, scale):
    """Each test of a fixed seed is asked for a p-value above 1e-4."""
    u, tau = coordinates(mask_noise(3, torch.arange(50), 5, 1000, 2, kind=kind, scale=scale), kind, scale)
    for uniforms in (u, tau):
        assert uniforms.min() >= 0.0 and uniforms.max() < 1.0
        assert stats.kstest(uniforms.flatten().numpy(), "uniform").pvalue > 1e-4
    assert stats.pearsonr(u.flatten().numpy(), tau.flatten().numpy()).pvalue > 1e-4


def test_no_noise_gives_a_uniform_of_one():
    e = torch.tensor([[1.0, 7.0], [-1.0, -7.0], [torch.inf, 40.0]])
    for kind in ("uniform", "normal"):
        for uniforms in coordinates(e, kind):
            assert bool(((uniforms >= 0.0) & (uniforms < 1.0)).all())


def test_too_little_noise_and_unknown_laws_are_refused():
    for dims in (0, 1):
        with pytest.raises(ValueError, match=f"noise of {dims} dimensions .* noise_dim must be at least 2"):
            coordinates(torch.zeros(2, 3, dims))
        with pytest.raises(ValueError, match="noise_dim must be at least 2"):
            sampled(SamplerSettings(2, sampler="coupled"), noise_dim=dims)
    with pytest.raises(ValueError, match="cauchy"):
        coordinates(torch.zeros(2, 3, 2), "cauchy")
    with pytest.raises(
        ValueError, match="the sampler is 'greedy'; choose one of ancestral, coupled, coupled_argmax"
    ):
        SamplerSettings(2, sampler="greedy")


@pytest.mark.parametrize(("kind", "scale"), [("uniform", 1.0), ("uniform", 3.0), ("normal", 0.5)])
def test_noise_of_positions_masked_at_a_time_tells_earlier_times(kind, scale):
    noise = mask_noise(3, IDS, 0, 500, 4, kind=kind, scale=scale)
    t = torch.linspace(0.05, 1.0, BATCH, dtype=torch.float64)
    earlier = noise_of_masked(noise, t, kind, scale)
    assert earlier.dtype == torch.float32
    (u, tau), (u_before, tau_before) = coordinates(earlier, kind, scale), coordinates(noise, kind, scale)
    assert torch.equal(u, u_before) and torch.equal(earlier[..., 2:], noise[..., 2:])
    assert (tau - t[:, None] * tau_before).abs().max() < 2.0**-23
    assert torch.equal(earlier[-1], noise[-1])


@given(t=TIMES)
def test_corruption_masks_what_is_revealed_at_earlier_times(t):
    x_0 = text()
    fixed = torch.arange(LENGTH).expand(BATCH, -1) < 2
    x_t = corrupt_coupled(
        x_0, COORDINATES.tau, torch.full((BATCH,), t, dtype=torch.float64), MASK, fixed_BL=fixed
    )
    masked = (COORDINATES.tau < t) & ~fixed
    assert torch.equal(x_t, torch.where(masked, MASK, x_0))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_labels_from_all_masks_are_the_sampled_text_bit_for_bit(num_steps, greedy):
    one = torch.ones(BATCH, dtype=torch.float64)
    teacher = Teacher(greedy=greedy)
    labels = trajectory_labels(teacher, ALL_MASKED, COORDINATES, one, num_steps, mask_id=MASK)
    sampler = "coupled_argmax" if greedy else "coupled"
    x_0 = sampled(SamplerSettings(num_steps, sampler=sampler))
    assert torch.equal(labels.view(BATCH, LENGTH), x_0)
    assert len(teacher.asked) == num_steps
    assert torch.cat(teacher.asked).sort().values.tolist() == list(range(BATCH * LENGTH))
    assert not torch.equal(x_0, sampled(SamplerSettings(num_steps)))


def test_the_sampler_reveals_when_tau_says_and_draws_by_u():
    asked = []

    def predict(x_BL, noise_BLD):
        asked.append((x_BL, noise_BLD))
        return network(x_BL, noise_BLD)

    names = {"seed": 9, "sample_ids_B": IDS, "mask_id": MASK, "noise_dim": DIM}
    x_0 = sample(
        predict, ALL_MASKED, settings=SamplerSettings(4, temperature=0.6, sampler="coupled"), **names
    )
    u, tau = COORDINATES
    states = [x for x, _ in asked] + [x_0]
    for i, (x, x_next) in enumerate(itertools.pairwise(states)):
        assert torch.equal(asked[i][1], NOISE)
        assert torch.equal(x == MASK, tau < 1 - i / 4) and torch.equal(x_next == MASK, tau < 1 - (i + 1) / 4)
        revealed = (x == MASK) & (x_next != MASK)
        ids = draw_tokens(network(x, NOISE)[revealed], u[revealed], mask_id=MASK, temperature=0.6)
        assert torch.equal(x_next[revealed], ids)


def test_the_last_step_of_a_coupled_sampler_can_be_greedy():
    settings = SamplerSettings(3, sampler="coupled")
    drawn, greedy = sampled(settings), sampled(replace(settings, greedy_last_step=True))
    late = COORDINATES.tau < 1 / 3
    assert torch.equal(drawn[~late], greedy[~late]) and not torch.equal(drawn[late], greedy[late])
    x_last = corrupt_coupled(drawn, COORDINATES.tau, torch.full((BATCH,), 1 / 3, dtype=torch.float64), MASK)
    logits = network(x_last, NOISE)
    logits[..., MASK] = -torch.inf
    assert torch.equal(greedy[late], logits.argmax(-1)[late])


@pytest.mark.parametrize("sampler", ["coupled", "coupled_argmax"])
def test_a_coupled_sample_does_not_depend_on_its_batch(sampler):
    settings = SamplerSettings(5, sampler=sampler)
    whole = sampled(settings)
    for part in (slice(0, 5), slice(5, BATCH)):
        assert torch.equal(sampled(settings, ids=IDS[part]), whole[part])


def test_given_tokens_stay():
    x_t = ALL_MASKED.where(torch.arange(LENGTH) % 3 > 0, text())
    x_0 = sampled(SamplerSettings(3, sampler="coupled"), x_t)
    given_BL = x_t != MASK
    assert torch.equal(x_0[given_BL], x_t[given_BL]) and not bool((x_0 == MASK).any())


def state(t_B: torch.Tensor) -> torch.Tensor:
    return corrupt_coupled(text(), COORDINATES.tau, t_B, MASK)


def test_labels_are_those_of_the_masked_positions_and_states_lie_on_the_way():
    """From x_t, the state at a time of the grid and the rest of the way from there give the same text."""
    t = stratified_times(9, 4, BATCH)
    x_t = state(t)
    x_0 = trajectory(Teacher(), x_t, COORDINATES, t, 4, mask_id=MASK)
    assert torch.equal(trajectory_labels(Teacher(), x_t, COORDINATES, t, 4, mask_id=MASK), x_0[x_t == MASK])
    assert torch.equal(x_0[x_t != MASK], x_t[x_t != MASK])
    fixed = x_t != MASK
    x_s = corrupt_coupled(x_0, COORDINATES.tau, t / 2, MASK, fixed_BL=fixed)
    assert bool((x_s == MASK).any()) and not torch.equal(x_s == MASK, x_t == MASK)
    assert torch.equal(trajectory(Teacher(), x_s, COORDINATES, t / 2, 2, mask_id=MASK), x_0)


def test_a_label_does_not_depend_on_its_batch():
    t = stratified_times(9, 4, BATCH)
    x_t = state(t)
    together = trajectory(Teacher(), x_t, COORDINATES, t, 3, mask_id=MASK)
    for b in range(BATCH):
        one = slice(b, b + 1)
        noise = Coordinates(*(uniforms[one] for uniforms in COORDINATES))
        assert torch.equal(
            trajectory(Teacher(NOISE[one]), x_t[one], noise, t[one], 3, mask_id=MASK), together[one]
        )


@pytest.mark.parametrize("dt", [1 / 16, 0.1, 0.4])
def test_progressive_labels_are_those_of_two_written_out_steps(dt):
    t = stratified_times(9, 4, BATCH)
    x_t = state(t)
    teacher = Teacher()
    labels = progressive_labels(teacher, x_t, COORDINATES, t, dt, mask_id=MASK)
    u, tau = COORDINATES

    def token(logits_V, b, position):
        p = logits_V[:MASK].double().softmax(-1)
        return int((p.cumsum(-1) > u[b, position]).int().argmax())

    first = network(x_t, NOISE)
    x_s, expected, num_first = x_t.clone(), {}, 0
    for b, position in (x_t == MASK).nonzero().tolist():
        if tau[b, position] >= t[b] - dt:
            expected[b, position] = x_s[b, position] = token(first[b, position], b, position)
            num_first += 1
    second = network(x_s, NOISE)
    for b, position in (x_s == MASK).nonzero().tolist():
        expected[b, position] = token(second[b, position], b, position)
    assert labels.tolist() == [int(expected[at]) for at in sorted(expected)]
    assert 0 < num_first < len(labels)
    assert [len(positions) for positions in teacher.asked] == [num_first, len(labels) - num_first]


def test_tokens_are_asked_for_as_often_whatever_the_data():
    t = torch.full((BATCH,), 0.4, dtype=torch.float64)
    for x_t in (ALL_MASKED, text(), state(t)):
        for steps, of in ((3, trajectory_labels), (5, rollout)):
            teacher = Teacher()
            of(teacher, x_t, COORDINATES, t, steps, mask_id=MASK)
            assert len(teacher.asked) == steps
        teacher = Teacher()
        progressive_labels(teacher, x_t, COORDINATES, t, 0.9, mask_id=MASK)
        assert len(teacher.asked) == 2
    assert trajectory_labels(Teacher(), text(), COORDINATES, t, 2, mask_id=MASK).shape == (0,)
    for of in (trajectory, rollout):
        with pytest.raises(ValueError, match="num_steps is 0"):
            of(Teacher(), ALL_MASKED, COORDINATES, t, 0, mask_id=MASK)


@given(times=st.lists(TIMES, min_size=BATCH, max_size=BATCH), num_steps=st.integers(1, 7))
def test_a_rollout_ends_with_exactly_the_later_positions_masked(times, num_steps):
    t = torch.tensor(times, dtype=torch.float64)
    tau = COORDINATES.tau.clone()
    tau[:, :2] = torch.stack([t, torch.nextafter(t, torch.zeros_like(t))], -1).clamp(max=1 - 2.0**-53)
    x_1 = ALL_MASKED.clone()
    x_1[:, -1] = 4
    teacher = Teacher()
    x_t = rollout(teacher, x_1, Coordinates(COORDINATES.u, tau), t, num_steps, mask_id=MASK)
    assert len(teacher.asked) == num_steps
    assert bool((x_t[:, -1] == 4).all())
    assert torch.equal((x_t == MASK)[:, :-1], (tau < t[:, None])[:, :-1])


def test_a_rollout_is_the_beginning_of_the_sampled_trajectory():
    half = torch.full((BATCH,), 0.5, dtype=torch.float64)
    x_0 = sampled(SamplerSettings(8, sampler="coupled"))
    x_half = rollout(Teacher(), ALL_MASKED, COORDINATES, half, 4, mask_id=MASK)
    assert torch.equal(x_half, corrupt_coupled(x_0, COORDINATES.tau, half, MASK))
    other = rollout(Teacher(), ALL_MASKED, COORDINATES, half, 1, mask_id=MASK)
    assert torch.equal(other == MASK, x_half == MASK) and not torch.equal(other, x_half)


@given(
    masks=st.lists(st.integers(0, 2**LENGTH - 1), min_size=BATCH, max_size=BATCH),
    num_steps=st.integers(1, LENGTH + 3),
    grid=st.sampled_from(["order", "position"]),
)
def test_even_shares_reveal_equally_many_in_the_order_of_times_or_positions(masks, num_steps, grid):
    times_BL = COORDINATES.tau if grid == "order" else 1 - torch.arange(LENGTH).expand(BATCH, -1) / LENGTH
    masked_BL = torch.tensor([[mask >> i & 1 for i in range(LENGTH)] for mask in masks]).bool()
    teacher = Teacher()
    x_BL = trajectory(
        teacher,
        torch.zeros(BATCH, LENGTH, dtype=torch.int64).masked_fill(masked_BL, MASK),
        COORDINATES,
        torch.full((BATCH,), 0.5),
        num_steps,
        mask_id=MASK,
        grid=grid,
    )
    assert not (x_BL == MASK).any() and (x_BL[~masked_BL] == 0).all()
    revealed_BL = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for i, positions_N in enumerate(teacher.asked, 1):
        now_BL = (
            torch.zeros(BATCH * LENGTH, dtype=torch.bool).index_fill(0, positions_N, True).view(BATCH, LENGTH)
        )
        assert not (now_BL & (revealed_BL | ~masked_BL)).any()
        revealed_BL |= now_BL
        counts_B = masked_BL.sum(1)
        assert torch.equal(revealed_BL.sum(1), (counts_B * i / num_steps).ceil().long())
        later_BL = times_BL.masked_fill(~(masked_BL & ~revealed_BL), -1)
        earlier_BL = times_BL.masked_fill(~revealed_BL, 2)
        assert (later_BL.amax(1) < earlier_BL.amin(1)).all()
