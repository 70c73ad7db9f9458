"""Losses over a vocabulary that is cut over two processes (here two threads) equal those over the whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from imdm_scale.diffusion.divergence import DIVERGENCES, divergence
from imdm_scale.diffusion.likelihood import cross_entropy, forbid_mask, log_softmax, nelbo_terms
from imdm_scale.diffusion.vocabulary import Vocabulary

CUTS = (0, 13, 40)
MASK = 25


class Exchange:
    """What the threads lay on the table between two barriers."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.parts: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]

    def gather(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        gathered = torch.stack(self.parts)
        self.barrier.wait()
        return gathered


class Shard(Vocabulary):
    def __init__(self, rank: int, exchange: Exchange) -> None:
        self.rank, self.exchange, self.first_id = rank, exchange, CUTS[rank]

    def sum(self, x_NV: torch.Tensor) -> torch.Tensor:
        return self.exchange.gather(self.rank, x_NV.sum(-1)).sum(0)

    def max(self, x_NV: torch.Tensor) -> torch.Tensor:
        return self.exchange.gather(self.rank, x_NV.amax(-1)).amax(0)


def logits(seed: int) -> torch.Tensor:
    return 4 * torch.randn(6, CUTS[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 12, 13, 39, 20, 5])
TIMES = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def loss_by_name(name: str, x: torch.Tensor, cut: slice, vocabulary: Vocabulary) -> torch.Tensor:
    if name == "cross_entropy":
        return cross_entropy(x, LABELS, vocabulary)
    if name == "nelbo":
        return nelbo_terms(x, LABELS, TIMES, MASK, vocabulary)
    teacher = forbid_mask(logits(2)[:, cut], MASK, vocabulary)
    return divergence(name, forbid_mask(x, MASK, vocabulary), teacher, vocabulary)


def run_cut(function):
    """`function(cut, vocabulary)` on both shards at once."""
    exchange = Exchange()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(function, slice(*CUTS[r : r + 2]), Shard(r, exchange)) for r in range(2)]
        return [job.result() for job in jobs]


@pytest.mark.parametrize("name", ["cross_entropy", "nelbo", *DIVERGENCES])
def test_two_shards_give_the_loss_and_gradient_of_the_whole(name):
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)

    def loss_and_grad(cut: slice, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits(1)[:, cut].clone().requires_grad_()
        loss = loss_by_name(name, x, cut, vocabulary)
        return loss.detach(), torch.autograd.grad((weights * loss).sum(), x)[0]

    whole_loss, whole_grad = loss_and_grad(slice(None), Vocabulary())
    (loss_0, grad_0), (loss_1, grad_1) = run_cut(loss_and_grad)
    assert torch.equal(loss_0, loss_1)
    assert torch.allclose(loss_0, whole_loss, rtol=1e-12)
    assert torch.allclose(torch.cat([grad_0, grad_1], -1), whole_grad, rtol=1e-9, atol=1e-15)


def test_two_shards_give_the_log_probabilities_of_the_whole():
    parts = run_cut(lambda cut, vocabulary: log_softmax(logits(1)[:, cut], vocabulary))
    assert torch.allclose(torch.cat(parts, -1), log_softmax(logits(1)), rtol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_logits_give_exact_zeros_on_both_shards(name):
    def loss_and_grad(cut: slice, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits(1)[:, cut].clone().requires_grad_()
        loss = divergence(name, x, x.detach(), vocabulary)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    for loss, grad in run_cut(loss_and_grad):
        assert bool((loss == 0).all()) and bool((grad == 0).all())
