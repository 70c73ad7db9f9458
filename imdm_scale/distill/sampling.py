"""Texts sampled by a network that is spread over ranks.

Shapes: B batch, L positions, N masked positions, P positions of a prefix, S samples, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.diffusion.sampler import SamplerSettings, sample_by
from imdm_scale.parallel.engine import ModelEngine


def sample_texts(
    model: ModelEngine,
    settings: SamplerSettings,
    num_samples: int,
    batch_size: int,
    seed: int,
    bos_id: int | None,
    *,
    first_sample: int = 0,
    prefixes_SP: Tensor | None = None,
    sampler: str | None = None,
    rank_V: Tensor | None = None,
) -> Tensor:
    """Token ids (S, L) of samples, the same for every number of ranks.

    Collective: data-parallel ranks sample different texts, in equally many batches, because partitioned weights
    are gathered in step.

    Args:
        settings: how to sample, but for the sampler.
        bos_id: the id at position 0, where every block of the data begins with it; all else starts masked. None
            where the data have no such id: position 0 is then masked as well.
        first_sample: number of the first sample. A sample is a function of its number and the seed, so that texts
            drawn in several calls are those of one.
        prefixes_SP: int64 ids that begin the samples, BOS included; None begins them with `bos_id` alone.
        sampler: one of `SAMPLERS`; None takes the architecture's, for which the network was trained.
        rank_V: int64 places of the tokens in the order in which they are drawn; None is the order of ids.

    Returns:
        int64 on the CPU, the same on every rank of the network.
    """
    architecture, dp_size = model.architecture, model.groups.dp_size
    settings = replace(settings, sampler=architecture.sampler if sampler is None else sampler)
    num_batches = -(-num_samples // (batch_size * dp_size))
    first = model.groups.dp_rank * num_batches * batch_size
    texts = []
    with model.evaluating():
        for index in range(num_batches):
            rows_B = first + index * batch_size + torch.arange(batch_size, device=model.device)
            x_BL = torch.full(
                (batch_size, architecture.length), architecture.mask_token_id, device=model.device
            )
            if prefixes_SP is not None:
                # Rows beyond the last sample fill the batch and are dropped.
                prefixes_BP = prefixes_SP[rows_B.clamp(max=num_samples - 1).to(prefixes_SP.device)]
                x_BL[:, : prefixes_BP.size(1)] = prefixes_BP.to(model.device)
            elif bos_id is not None:
                x_BL[:, 0] = bos_id
            texts.append(fill_masks(model, settings, x_BL, first_sample + rows_B, seed, rank_V=rank_V))
    return over_replicas(model, torch.cat(texts))[:num_samples].cpu()


def fill_masks(
    model: ModelEngine,
    settings: SamplerSettings,
    x_t_BL: Tensor,
    sample_ids_B: Tensor,
    seed: int,
    *,
    start_time: float | Tensor = 1.0,
    rank_V: Tensor | None = None,
) -> Tensor:
    """`sample_by` with a network that is spread over ranks: int64 (B, L) without masks, on all ranks of a replica.

    Collective over the replica, and over all of them where they share partitioned weights.
    """
    architecture = model.architecture

    def draw(x_BL: Tensor, noise_BLD: Tensor, positions_N: Tensor, u_N: Tensor, greedy: bool) -> Tensor:
        return model.tokens(
            x_BL,
            lambda rows: noise_BLD[rows],
            positions_N,
            u_N,
            temperature=settings.temperature,
            top_p=settings.top_p,
            greedy=greedy,
            rank_V=rank_V,
        )

    with model.evaluating():
        return sample_by(
            draw,
            x_t_BL,
            settings=settings,
            seed=seed,
            sample_ids_B=sample_ids_B,
            mask_id=architecture.mask_token_id,
            noise_dim=architecture.noise_dim,
            noise_kind=architecture.noise_kind,
            noise_scale=architecture.noise_scale,
            start_time=start_time,
        )


def over_replicas(model: ModelEngine, mine_SL: Tensor) -> Tensor:
    """What all data-parallel replicas have, in their order, (replicas x S, L). Collective."""
    parts = [torch.empty_like(mine_SL) for _ in range(model.groups.dp_size)]
    dist.all_gather(parts, mine_SL, group=model.groups.mpu.dp)
    return torch.cat(parts)
