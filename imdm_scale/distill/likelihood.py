"""The likelihood bound of a network that is spread over ranks, on held-out blocks.

Shapes: B batch, L positions, N masked positions, S sequences, K draws for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.diffusion.likelihood import nelbo_terms
from imdm_scale.diffusion.schedule import stratified_times
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.states import CorruptedData
from imdm_scale.parallel.engine import ModelEngine

SAMPLING_EPS = 1e-3
"""Smallest time that is drawn, as in training and in the literature."""


@dataclass(frozen=True)
class Likelihood:
    """An estimate of the bound."""

    nelbo: float
    """In nats per token."""
    standard_error: float | None
    """Over sequences, as a sample of all such text: their Monte Carlo error is part of it. None for a single one.
    Strata of t that the sequences share make the true error slightly smaller."""
    num_sequences: int
    num_draws: int
    """Of (t, x_t, e) for each sequence."""

    @property
    def perplexity(self) -> float:
        """exp of the bound: no less than the model's perplexity (Jensen)."""
        return math.exp(self.nelbo)


def summary(nelbo_KS: np.ndarray) -> Likelihood:
    """The estimate from the bound of each sequence by each draw, in nats per token."""
    nelbo_S = nelbo_KS.mean(axis=0)
    count = len(nelbo_S)
    error = float(nelbo_S.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Likelihood(float(nelbo_S.mean()), error, count, len(nelbo_KS))


def validation_nelbo(
    model: ModelEngine, blocks: np.ndarray, batch_size: int, seed: int, num_draws: int = 1
) -> Likelihood:
    """The bound on all of the blocks (S, L), by `num_draws` draws for each. Collective; the same for every layout."""
    draws = [nelbo_of_draw(model, blocks, batch_size, seed, draw, num_draws) for draw in range(num_draws)]
    return summary(np.stack(draws))


def nelbo_of_draw(
    model: ModelEngine, blocks: np.ndarray, batch_size: int, seed: int, draw: int, num_draws: int
) -> np.ndarray:
    """The bound of each block by one draw of (t, x_t, e), in nats per token: float64 (S,), on every rank.

    L = E_{t,e,x_t} (1/t) sum_{l: x_t^l = m} -log x_theta(x_t, e)_{l, x_0^l} (MDLM, arXiv 2406.07524), over t
    uniform on [SAMPLING_EPS, 1). A sequence's K draws have a K-th of that range each, and within it the sequences
    are stratified, so that both means have little variance. No block is left out: those that fill the last batches
    are computed a second time and not counted. Collective over the network's ranks.

    Args:
        blocks: (S, L) integers, at least one; visited in an order that the seed decides, which the result has too.
        draw: in [0, num_draws).
    """
    groups, device, architecture = model.groups, model.device, model.architecture
    unit = model.pipeline.micro_batch_unit
    count, length = blocks.shape
    batch_size = -(-min(batch_size, -(-count // groups.dp_size)) // unit) * unit
    num_batches = -(-count // (batch_size * groups.dp_size))
    stream, states = TokenStream(ArrayCorpus(blocks), seed), CorruptedData(architecture)
    within_S = stratified_times(seed, draw, count, sampling_eps=0.0)
    t_S = SAMPLING_EPS + (1.0 - SAMPLING_EPS) * (draw + within_S) / num_draws
    total_S = torch.zeros(count, dtype=torch.float64, device=device)
    for index in range(num_batches):
        first = (groups.dp_rank * num_batches + index) * batch_size
        slots_B = torch.arange(first, first + batch_size)
        ids_BL, sample_ids_B = stream.fetch((slots_B % count).numpy()), slots_B % count
        batch = states.micro_batch(seed, draw, ids_BL, sample_ids_B, t_S[sample_ids_B])

        def terms(output: Tensor, which: slice, batch: MicroBatch = batch) -> Tensor:
            return nelbo_terms(
                model.logits(output),
                batch.labels_N[which].to(device),
                batch.t_N[which].to(device),
                architecture.mask_token_id,
                model.vocabulary,
            )

        terms_N = model.infer(
            batch.x_t_BL,
            lambda rows, batch=batch: batch.mask_noise(architecture, device, rows),  # type: ignore[misc]
            batch.positions_N,
            terms,
        )
        if terms_N is not None and groups.tp_rank == 0:
            slots_N = slots_B[batch.positions_N // length]
            counts_N = slots_N < count
            total_S.index_add_(0, slots_N[counts_N].to(device), terms_N[counts_N.to(device)].double())
    dist.all_reduce(total_S, group=groups.everyone)
    return (total_S / length).cpu().numpy()
