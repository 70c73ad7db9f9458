"""Losses and draws over a vocabulary that is cut over processes (here threads) equal those over the whole."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.diffusion import inverse_cdf as inverse_cdf_module
from imdm_scale.diffusion.coupling import (
    coordinates,
    corrupt_coupled,
    progressive_labels,
    trajectory_labels,
)
from imdm_scale.diffusion.divergence import DIVERGENCES, divergence
from imdm_scale.diffusion.inverse_cdf import argmax, integer_weights, inverse_cdf
from imdm_scale.diffusion.likelihood import cross_entropy, forbid_mask, log_softmax, nelbo_terms
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.sampler import SAMPLERS, SamplerSettings, draw_tokens, sample, sample_by
from imdm_scale.diffusion.targets import two_substep_targets
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.diffusion.vocabulary_order import ranks_of, shard_of_ranks

CUTS = (0, 13, 40)
MASK = 25


class Exchange:
    """What the threads lay on the table between two barriers."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size

    def gather(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        gathered = torch.stack(self.parts)
        self.barrier.wait()
        return gathered


class Shard(Vocabulary):
    def __init__(self, rank: int, first_id: int, exchange: Exchange) -> None:
        self.rank, self.first_id, self.exchange = rank, first_id, exchange

    def sum(self, x_NV: torch.Tensor) -> torch.Tensor:
        return self.exchange.gather(self.rank, x_NV.sum(-1)).sum(0)

    def max(self, x_NV: torch.Tensor) -> torch.Tensor:
        return self.exchange.gather(self.rank, x_NV.amax(-1)).amax(0)

    def exclusive_sum(self, x_N: torch.Tensor) -> torch.Tensor:
        return self.exchange.gather(self.rank, x_N)[: self.rank].sum(0)


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


def run_cut(function, cuts: Sequence[int] = CUTS):
    """`function(cut, vocabulary)` on all shards at once."""
    size = len(cuts) - 1
    exchange = Exchange(size)
    with ThreadPoolExecutor(size) as pool:
        jobs = [
            pool.submit(function, slice(*cuts[r : r + 2]), Shard(r, cuts[r], exchange)) for r in range(size)
        ]
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


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 300),
    num_shards=st.integers(1, 5),
    more_padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    levels=st.sampled_from([2, 5, 10_000]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1e-6, 0.3, 0.5, 0.9, 1.0]),
    max_elements=st.sampled_from([7, 500, 2**24]),
)
def test_a_draw_does_not_depend_on_how_the_vocabulary_is_cut(
    seed, vocab, num_shards, more_padding, dtype, levels, temperature, top_p, max_elements
):
    """Bit for bit: with ties, forbidden ids, padding, whole shards of it, and uniforms on the CDF's steps."""
    generator = torch.Generator().manual_seed(seed)
    rows = 24
    x = (torch.randint(levels, (rows, vocab), generator=generator) * (24 / levels) - 12).to(dtype)
    forbidden = torch.rand(rows, vocab, generator=generator) < 0.2
    forbidden[:, seed % vocab] = False
    x[forbidden] = -1e6
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0.0, 1.0 - 2.0**-53
    cdf = integer_weights(x, temperature).cumsum(-1)
    steps = cdf[8:, seed % vocab].double() / cdf[8:, -1]
    u[8:] = steps.clamp(max=1.0 - 2.0**-53)

    width = -(-vocab // num_shards) + more_padding
    padded = torch.cat([x, x.new_full((rows, num_shards * width - vocab), -1e6)], -1)
    cuts = range(0, num_shards * width + 1, width)

    def draw(cut: slice, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        ids = inverse_cdf(padded[:, cut], u, temperature=temperature, top_p=top_p, vocabulary=vocabulary)
        return ids, argmax(padded[:, cut], vocabulary)

    whole = inverse_cdf(x, u, temperature=temperature, top_p=top_p)
    assert not bool(forbidden.gather(-1, whole[:, None]).any())
    with mock.patch.object(inverse_cdf_module, "MAX_ELEMENTS", max_elements):
        for ids, greedy_ids in run_cut(draw, cuts):
            assert torch.equal(ids, whole)
            assert torch.equal(greedy_ids, x.argmax(-1))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 300),
    num_shards=st.integers(1, 5),
    levels=st.sampled_from([2, 5, 10_000]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    max_elements=st.sampled_from([7, 2**24]),
)
def test_a_draw_in_another_order_does_not_depend_on_the_cut(
    seed, vocab, num_shards, levels, top_p, max_elements
):
    """Bit for bit the draw by id from columns that stand in that order; with ties, forbidden ids and padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = 24
    x = torch.randint(levels, (rows, vocab), generator=generator) * (24 / levels) - 12
    forbidden = torch.rand(rows, vocab, generator=generator) < 0.2
    forbidden[:, seed % vocab] = False
    x[forbidden] = -1e6
    order = torch.randperm(vocab, generator=generator)
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0.0, 1.0 - 2.0**-53
    cdf = integer_weights(x[:, order]).cumsum(-1)
    u[8:] = (cdf[8:, seed % vocab].double() / cdf[8:, -1]).clamp(max=1.0 - 2.0**-53)

    width = -(-vocab // num_shards)
    padded = torch.cat([x, x.new_full((rows, num_shards * width - vocab), -1e6)], -1)
    rank = ranks_of(order)

    def draw(cut: slice, vocabulary: Vocabulary) -> torch.Tensor:
        part = shard_of_ranks(rank, cut.start, width)
        return inverse_cdf(padded[:, cut], u, top_p=top_p, vocabulary=vocabulary, rank_V=part)

    expected = inverse_cdf(x, u, top_p=top_p, rank_V=rank)
    if top_p == 1.0:  # of equally likely tokens the nucleus keeps those of lower ids, whatever the order
        assert torch.equal(expected, order[inverse_cdf(x[:, order], u)])
    assert not bool(forbidden.gather(-1, expected[:, None]).any())
    with mock.patch.object(inverse_cdf_module, "MAX_ELEMENTS", max_elements):
        for ids in run_cut(draw, range(0, num_shards * width + 1, width)):
            assert torch.equal(ids, expected)


def network(x_BL: torch.Tensor, noise_BLD: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, V) that depend on the text and on the noise of masked positions."""
    table = logits(4).float()
    context_BL = (x_BL + 3 * x_BL.roll(1, 1) + 5 * x_BL.roll(-1, 1)) % len(table)
    return table[context_BL] + (x_BL == MASK)[..., None] * noise_BLD.sum(-1, keepdim=True) * table[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("greedy", [False, True])
def test_shards_sample_the_texts_of_the_whole(greedy, sampler):
    rank_V = torch.randperm(CUTS[-1], generator=torch.Generator().manual_seed(5))
    options = {
        "settings": SamplerSettings(4, 0.8, top_p=0.9, greedy_last_step=greedy, sampler=sampler),
        "seed": 3,
        "sample_ids_B": torch.arange(5),
        "mask_id": MASK,
        "noise_dim": 2,
    }
    x_t = torch.full((5, 8), MASK)

    def shard_texts(cut: slice, vocabulary: Vocabulary) -> torch.Tensor:
        def draw(x_BL, noise_BLD, positions_N, u_N, greedy):
            logits_NV = network(x_BL, noise_BLD).flatten(0, 1)[positions_N][:, cut]
            return draw_tokens(
                logits_NV,
                u_N,
                mask_id=MASK,
                temperature=0.8,
                top_p=0.9,
                greedy=greedy,
                vocabulary=vocabulary,
                rank_V=rank_V[cut],
            )

        return sample_by(draw, x_t, **options)

    whole = sample(network, x_t, rank_V=rank_V, **options)
    for texts in run_cut(shard_texts, (0, 20, 40)):
        assert torch.equal(texts, whole)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_shards_show_the_coupled_labels_of_the_whole(num_steps):
    ids = torch.arange(5)
    noise = mask_noise(3, ids, 0, 8, 2)
    read = coordinates(noise)
    t = torch.linspace(0.3, 1.0, 5, dtype=torch.float64)
    x_t = corrupt_coupled(torch.arange(40).view(5, 8) % MASK, read.tau, t, MASK)
    rank_V = torch.randperm(CUTS[-1], generator=torch.Generator().manual_seed(5))

    def labels(cut: slice, vocabulary: Vocabulary) -> torch.Tensor:
        def tokens(x_BL, positions_N, u_N):
            logits_NV = network(x_BL, noise).flatten(0, 1)[positions_N][:, cut]
            return draw_tokens(logits_NV, u_N, mask_id=MASK, vocabulary=vocabulary, rank_V=rank_V[cut])

        of_trajectory = trajectory_labels(tokens, x_t, read, t, num_steps, mask_id=MASK)
        return torch.stack([of_trajectory, progressive_labels(tokens, x_t, read, t, 0.2, mask_id=MASK)])

    whole = labels(slice(None), Vocabulary())
    assert whole.shape == (2, int((x_t == MASK).sum()))
    for part in run_cut(labels, (0, 20, 40)):
        assert torch.equal(part, whole)


def test_shards_show_the_two_step_targets_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randint(MASK, (5, 8), generator=generator)
    x_t[torch.rand(5, 8, generator=generator) < 0.7] = MASK
    noise = torch.rand(5, 8, 2, generator=generator)
    t = torch.linspace(0.3, 1.0, 5, dtype=torch.float64)

    def targets(cut: slice, vocabulary: Vocabulary) -> torch.Tensor:
        def teacher(x_BL, noise_BLD, positions_N):
            return network(x_BL, noise_BLD).flatten(0, 1)[positions_N][:, cut]

        return two_substep_targets(
            teacher,
            x_t,
            noise,
            t,
            0.3,
            mask_id=MASK,
            seed=1,
            sample_ids_B=torch.arange(5),
            step=2,
            temperature=0.7,
            vocabulary=vocabulary,
        )

    assert torch.equal(torch.cat(run_cut(targets, (0, 20, 40)), -1), targets(slice(None), Vocabulary()))
