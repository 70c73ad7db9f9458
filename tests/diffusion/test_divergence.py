"""The divergences: exact zeros, gradients against autograd, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.diffusion.divergence import DIVERGENCES, divergence
from imdm_scale.diffusion.likelihood import forbid_mask

NAMES = list(DIVERGENCES)


def plain(name: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The textbook formulas."""
    m = (p + q) / 2
    return {
        "kl_backward": lambda: (p * (p / q).log()).sum(-1),
        "kl_forward": lambda: (q * (q / p).log()).sum(-1),
        "jsd": lambda: ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "mse": lambda: (p - q).square().sum(-1),
    }[name]()


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_equal_logits_give_exactly_zero_loss_and_gradient(name, dtype, scale):
    logits = forbid_mask(random_logits(7, 1000, scale=scale, dtype=dtype), 3)
    student = logits.clone().requires_grad_()
    loss = divergence(name, student, logits)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.dtype == dtype
    assert bool((loss == 0).all()) and bool((grad == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_agree_with_autograd_of_the_plain_formula(name):
    student = random_logits(5, 40, seed=1).requires_grad_()
    teacher = random_logits(5, 40, seed=2)
    weights = random_logits(5, seed=3)
    loss = divergence(name, student, teacher)
    expected = plain(name, student.softmax(-1), teacher.softmax(-1))
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad((weights * loss).sum(), student)
    (expected_grad,) = torch.autograd.grad((weights * expected).sum(), student)
    assert torch.allclose(grad, expected_grad, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: divergence(name, x, teacher), student)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name):
    student, teacher = random_logits(6, 5000, seed=1), random_logits(6, 5000, seed=2)
    losses, grads = [], []
    for dtype in (torch.float64, torch.float32):
        x = student.float().to(dtype).requires_grad_()
        loss = divergence(name, x, teacher.float().to(dtype))
        assert loss.dtype == dtype
        losses.append(loss.double())
        grads.append(torch.autograd.grad(loss.sum(), x)[0].double())
    assert torch.allclose(losses[1], losses[0], rtol=1e-5)
    assert (grads[1] - grads[0]).abs().max() <= 1e-5 * grads[0].abs().max()


logit_rows = st.lists(st.floats(-20, 20), min_size=6, max_size=6)


@settings(max_examples=150)
@given(st.sampled_from(NAMES), logit_rows, logit_rows)
def test_divergences_are_non_negative_bounded_and_zero_only_at_equality(name, student_row, teacher_row):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in (student_row, teacher_row))
    value = divergence(name, student, teacher).item()
    bound = {"tvd": 1.0, "jsd": math.log(2.0), "mse": 2.0}.get(name, math.inf)
    assert -1e-14 <= value <= bound + 1e-14
    distance = (student.softmax(-1) - teacher.softmax(-1)).abs().max().item()
    if distance > 1e-6:
        assert value > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_forbidden_and_disjoint_entries_stay_finite(name):
    """Also where only one side forbids an entry, or the supports do not meet at all."""
    student = torch.tensor([[2.0, -1e6, 1.0, -1e6], [0.0, -1e6, -1e6, -1e6]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, -1e6, -1e6], [-1e6, 0.0, -1e6, -1e6]])
    loss = divergence(name, student, teacher)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert bool(loss.isfinite().all()) and bool(grad.isfinite().all())
    disjoint = {"kl_backward": 1e6, "kl_forward": 1e6, "jsd": math.log(2.0), "tvd": 1.0, "mse": 2.0}
    assert loss[1].item() == pytest.approx(disjoint[name], rel=1e-6)


def test_the_teacher_gets_no_gradient_and_names_are_checked():
    student, teacher = (random_logits(2, 5, seed=seed).requires_grad_() for seed in (1, 2))
    divergence("jsd", student, teacher).sum().backward()
    assert student.grad is not None and teacher.grad is None
    with pytest.raises(ValueError, match="choose one of kl_backward, kl_forward, jsd, tvd, mse"):
        divergence("kl", student, teacher)
