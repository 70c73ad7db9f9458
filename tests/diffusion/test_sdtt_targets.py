"""IM-SDTT's targets: the reduced form against the whole procedure of two sub-steps, written out."""

from __future__ import annotations

import pytest
import torch

from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.inverse_cdf import inverse_cdf
from imdm_scale.diffusion.likelihood import forbid_mask
from imdm_scale.diffusion.noise import Purpose, mask_noise, uniform
from imdm_scale.diffusion.posterior import reverse_masses
from imdm_scale.diffusion.schedule import alpha, stratified_times
from imdm_scale.diffusion.targets import two_substep_targets, two_substeps

BATCH, LENGTH, VOCAB, MASK, DIM = 12, 20, 7, 6, 3
IDS = torch.arange(BATCH) + 100
MIX = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
READ = torch.randn(DIM, VOCAB, generator=torch.Generator().manual_seed(1))


def teacher_BLV(x_BL: torch.Tensor, noise_BLD: torch.Tensor) -> torch.Tensor:
    """A network that looks at the whole text, and at the noise of masked positions."""
    one_hot = torch.nn.functional.one_hot(x_BL, VOCAB).float()
    context = one_hot + one_hot.roll(1, 1) + one_hot.roll(-1, 1) + one_hot.mean(1, keepdim=True)
    return context @ MIX + (x_BL == MASK)[..., None] * (noise_BLD @ READ)


class Teacher:
    def __init__(self) -> None:
        self.num_positions: list[int] = []

    def __call__(self, x_BL, noise_BLD, positions_N):
        self.num_positions.append(len(positions_N))
        return teacher_BLV(x_BL, noise_BLD).flatten(0, 1)[positions_N]


def state(t_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_0 = torch.randint(VOCAB - 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    return corrupt(x_0, t_B, MASK, 9, IDS, 4), mask_noise(9, IDS, 4, LENGTH, DIM)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.double().clone()
    logits[..., MASK] = -1e6
    return logits.log_softmax(-1)


def whole_procedure(x_t, noise, t_B, dt, seed, step, other_draws) -> torch.Tensor:
    """Two sub-steps with the same e, position by position. Sub-step 1 uses the draws that the reduced form
    names; sub-step 2, whose draws must not matter, uses `other_draws`.
    """
    reveal = uniform(seed, IDS, Purpose.REVEAL, step, LENGTH, dtype=torch.float64)[..., 0]
    token = uniform(seed, IDS, Purpose.TOKEN, step, LENGTH, dtype=torch.float64)[..., 0]
    x = x_t.clone()
    target = torch.full((BATCH, LENGTH, VOCAB), float("nan"), dtype=torch.float64)
    second_times = (t_B - 2 * dt).clamp(min=1e-3)
    for times, u_reveal, u_token in ((t_B, reveal, token), (second_times, *other_draws)):
        log_p = log_probs(teacher_BLV(x, noise))
        for b in range(BATCH):
            # A time below 0 gives alpha_s > 1 and an unmasking mass above 1: everything is revealed.
            unmask = reverse_masses(alpha(times[b]), alpha(times[b] - dt)).unmask
            for position in range(LENGTH):
                if x_t[b, position] != MASK or x[b, position] != MASK:
                    continue
                target[b, position] = log_p[b, position]
                if u_reveal[b, position] < unmask:
                    cdf = log_p[b, position].exp().cumsum(-1)
                    x[b, position] = int((cdf > u_token[b, position] * cdf[-1]).int().argmax())
    return target[x_t == MASK]


@pytest.mark.parametrize("dt", [1 / 256, 0.1, 0.4])
def test_the_reduced_form_is_the_whole_procedure(dt):
    t = stratified_times(9, 4, BATCH)
    x_t, noise = state(t)
    names = {"mask_id": MASK, "seed": 9, "sample_ids_B": IDS, "step": 4}
    target = two_substep_targets(Teacher(), x_t, noise, t, dt, **names)
    assert target.shape == (int((x_t == MASK).sum()), VOCAB)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        other = [torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64) for _ in range(2)]
        expected = whole_procedure(x_t, noise, t, dt, 9, 4, other)
        assert torch.allclose(log_probs(target), expected, rtol=1e-9, atol=1e-9)
    first = log_probs(teacher_BLV(x_t, noise)[x_t == MASK])
    changed = ((log_probs(target) - first).abs().amax(-1) > 1e-6).float().mean()
    assert 0.0 < changed < 1.0


def test_the_teacher_is_asked_twice_whatever_is_left():
    t = torch.full((BATCH,), 0.3, dtype=torch.float64)
    x_t, noise = state(t)
    num_masked = int((x_t == MASK).sum())
    names = {"mask_id": MASK, "seed": 9, "sample_ids_B": IDS, "step": 4}
    teacher = Teacher()
    target = two_substep_targets(teacher, x_t, noise, t, 0.5, **names)
    assert teacher.num_positions == [num_masked, 0]
    assert torch.equal(log_probs(target), log_probs(teacher_BLV(x_t, noise)[x_t == MASK]))
    clean = torch.zeros_like(x_t)
    assert two_substep_targets(Teacher(), clean, noise, t, 0.5, **names).shape == (0, VOCAB)


def test_hidden_states_serve_as_rows_and_every_process_draws():
    """A network whose end is on one process: there the rows are hidden states, elsewhere there are none."""
    t = stratified_times(9, 4, BATCH)
    x_t, noise = state(t)
    names = {"mask_id": MASK, "seed": 9, "sample_ids_B": IDS, "step": 4}
    read_out = torch.eye(2 * VOCAB, VOCAB) + torch.eye(2 * VOCAB, VOCAB).roll(VOCAB, 0)
    sent: list[torch.Tensor] = []
    asked: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"end": [], "start": []}

    def hidden_states(x_BL, positions_N):
        asked["end"].append((x_BL, positions_N))
        logits_NV = teacher_BLV(x_BL, noise).flatten(0, 1)[positions_N]
        return torch.cat([logits_NV + 2, torch.full_like(logits_NV, -2.0)], -1)

    def draw(rows, u_N):
        sent.append(inverse_cdf(forbid_mask(rows @ read_out, MASK), u_N))
        return sent[-1]

    def nothing(x_BL, positions_N):
        asked["start"].append((x_BL, positions_N))

    def receive(rows, u_N):
        assert rows is None and len(u_N) == len(sent[0])
        return sent[0]

    rows = two_substeps(hidden_states, draw, x_t, t, 0.1, **names)
    assert two_substeps(nothing, receive, x_t, t, 0.1, **names) is None
    assert len(sent) == 1 and len(asked["end"]) == len(asked["start"]) == 2
    for end, start in zip(asked["end"], asked["start"], strict=True):
        assert torch.equal(end[0], start[0]) and torch.equal(end[1], start[1])
    expected = two_substep_targets(Teacher(), x_t, noise, t, 0.1, **names)
    assert torch.allclose(forbid_mask(rows @ read_out, MASK), expected, atol=1e-5)


def test_targets_carry_no_gradient_forbid_the_mask_and_leave_the_input_alone():
    t = torch.full((BATCH,), 0.8, dtype=torch.float64)
    x_t, noise = state(t)
    before = x_t.clone()
    target = two_substep_targets(
        Teacher(), x_t, noise.requires_grad_(), t, 0.1, mask_id=MASK, seed=9, sample_ids_B=IDS, step=4
    )
    assert not target.requires_grad
    assert bool((target.softmax(-1)[:, MASK] == 0).all())
    assert torch.equal(x_t, before)


def test_targets_are_the_same_on_any_split_of_the_batch():
    t = stratified_times(9, 4, BATCH)
    x_t, noise = state(t)
    names = {"mask_id": MASK, "seed": 9, "step": 4}
    whole = two_substep_targets(Teacher(), x_t, noise, t, 0.1, sample_ids_B=IDS, **names)
    parts = [
        two_substep_targets(Teacher(), x_t[b], noise[b], t[b], 0.1, sample_ids_B=IDS[b], **names)
        for b in (slice(0, 5), slice(5, None))
    ]
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-5)


def test_temperature_makes_the_teacher_sharper_in_what_it_draws_and_shows():
    """Tempering is the same as another teacher whose logits are divided, mask rule and draws included."""
    t = stratified_times(9, 4, BATCH)
    x_t, noise = state(t)
    names = {"mask_id": MASK, "seed": 9, "sample_ids_B": IDS, "step": 4}
    tempered = two_substep_targets(Teacher(), x_t, noise, t, 0.3, temperature=0.5, **names)
    sharper = two_substep_targets(lambda *inputs: 2 * Teacher()(*inputs), x_t, noise, t, 0.3, **names)
    assert torch.equal(tempered, sharper)
    assert not torch.allclose(tempered, two_substep_targets(Teacher(), x_t, noise, t, 0.3, **names))
