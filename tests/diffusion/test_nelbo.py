"""Cross-entropy, the forbidden mask id, and the NELBO of a distribution that is known exactly.

The NELBO's estimate has a fixed seed; with a new one a correct program would leave the five standard errors
with probability 6e-7.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.likelihood import cross_entropy, forbid_mask, log_softmax, nelbo_terms
from imdm_scale.diffusion.schedule import stratified_times

LENGTH, VOCAB, MASK = 4, 3, 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_agrees_with_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(9, 50, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(50, (9,), generator=generator)
    weights = torch.randn(9, generator=generator)
    wide = logits.detach().double().requires_grad_()
    loss = cross_entropy(logits, labels)
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(loss.double(), expected, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad((loss * weights).sum(), logits)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), wide)
    assert grad.dtype == dtype
    assert torch.allclose(
        grad, expected_grad.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )


def test_log_softmax_stands_huge_logits():
    logits = torch.tensor([[1e4, 0.0, -1e6], [-1e6, -1e6, -1e6 + 1.0]])
    assert torch.allclose(log_softmax(logits), torch.log_softmax(logits.double(), -1).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_is_forbidden_without_touching_the_input(dtype):
    logits = torch.full((2, 5), 3.0, dtype=dtype, requires_grad=True)
    allowed = forbid_mask(logits, 2)
    p = allowed.double().softmax(-1)
    assert bool((logits == 3.0).all()) and bool((p[:, 2] == 0.0).all())
    assert torch.allclose(p[:, [0, 1, 3, 4]], torch.full((2, 4), 0.25, dtype=torch.float64))
    (grad,) = torch.autograd.grad(allowed.sum(), logits)
    assert grad[0].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def markov_chain() -> torch.Tensor:
    """Probability of every text of the chain: (VOCAB,) * LENGTH, float64."""
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    move = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.45, 0.5, 0.05]], dtype=torch.float64)
    return torch.einsum("a,ab,bc,cd->abcd", start, move, move, move)


def exact_denoiser(joint: torch.Tensor) -> torch.Tensor:
    """p(x_0 at a position | x_t) for every x_t, by enumeration: ((VOCAB + 1) ** LENGTH, LENGTH, VOCAB)."""
    rows = []
    for x_t in itertools.product(range(VOCAB + 1), repeat=LENGTH):
        matches = joint.clone()
        for position, token in enumerate(x_t):
            if token != MASK:
                keep = torch.arange(VOCAB) == token
                matches = matches * keep.view([-1 if axis == position else 1 for axis in range(LENGTH)])
        matches = matches / matches.sum()
        rows.append(torch.stack([matches.sum([a for a in range(LENGTH) if a != i]) for i in range(LENGTH)]))
    return torch.stack(rows)


def estimate_nelbo(joint: torch.Tensor, denoiser: torch.Tensor, n: int = 400_000) -> tuple[float, float]:
    """NELBO in nats a text, and its standard error (an upper bound: the strata only lower it)."""
    generator = torch.Generator().manual_seed(4)
    flat = torch.multinomial(joint.flatten(), n, replacement=True, generator=generator)
    powers = VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    x_0 = flat[:, None] // powers % VOCAB
    t = stratified_times(5, 0, n)
    x_t = corrupt(x_0, t, MASK, 5, torch.arange(n), 0)
    masked = x_t == MASK
    state = (x_t * (VOCAB + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    logits = torch.nn.functional.pad(denoiser.log()[state][masked], (0, 1), value=5.0)
    terms = nelbo_terms(logits, x_0[masked], t[:, None].expand_as(x_0)[masked], MASK)
    per_text = torch.zeros(n, LENGTH, dtype=torch.float64).masked_scatter(masked, terms).sum(-1)
    return per_text.mean().item(), per_text.std().item() / math.sqrt(n)


def test_the_nelbo_of_a_known_distribution_brackets_its_entropy():
    """With the exact denoiser the continuous-time NELBO is the entropy; with any other it is larger.

    Besides the five standard errors, times below 1e-3 and mask probabilities above 0.999 are never drawn:
    each lacks at most 1e-3 * LENGTH * ln VOCAB, and the mean over the shorter range of t gives back 1e-3 of
    the rest.
    """
    joint = markov_chain()
    denoiser = exact_denoiser(joint)
    entropy = -(joint * joint.log()).sum().item()
    truncation = 3e-3 * LENGTH * math.log(VOCAB)
    exact, error = estimate_nelbo(joint, denoiser)
    assert abs(exact - entropy) <= 5 * error + truncation < 0.02 * entropy

    tempered = denoiser.sqrt() / denoiser.sqrt().sum(-1, keepdim=True)
    worse, worse_error = estimate_nelbo(joint, tempered)
    assert worse > entropy + 5 * worse_error + truncation
