"""Texts sampled by a network that is spread over ranks, and its likelihood bound on held-out text.

Shapes: B batch, L positions, N masked positions, S samples, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.diffusion.likelihood import nelbo_terms
from imdm_scale.diffusion.sampler import SamplerSettings, sample_by
from imdm_scale.distill.batch_plan import BatchPlan
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.states import CorruptedData
from imdm_scale.errors import UserError
from imdm_scale.parallel.engine import ModelEngine


def sample_texts(
    model: ModelEngine,
    settings: SamplerSettings,
    num_samples: int,
    batch_size: int,
    seed: int,
    bos_id: int | None,
    *,
    sampler: str | None = None,
    rank_V: Tensor | None = None,
) -> Tensor:
    """Token ids (S, L) of unconditional samples, the same for every number of ranks.

    Collective: data-parallel ranks sample different texts, in equally many batches, because partitioned weights
    are gathered in step.

    Args:
        settings: how to sample, but for the sampler.
        bos_id: the id at position 0, where every block of the data begins with it; all else starts masked. None
            where the data have no such id: position 0 is then masked as well.
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
        for index in range(num_batches):
            sample_ids_B = first + index * batch_size + torch.arange(batch_size, device=model.device)
            x_BL = torch.full(
                (batch_size, architecture.length), architecture.mask_token_id, device=model.device
            )
            if bos_id is not None:
                x_BL[:, 0] = bos_id
            texts.append(
                sample_by(
                    draw,
                    x_BL,
                    settings=settings,
                    seed=seed,
                    sample_ids_B=sample_ids_B,
                    mask_id=architecture.mask_token_id,
                    noise_dim=architecture.noise_dim,
                    noise_kind=architecture.noise_kind,
                    noise_scale=architecture.noise_scale,
                )
            )
    mine_SL = torch.cat(texts)
    parts = [torch.empty_like(mine_SL) for _ in range(dp_size)]
    dist.all_gather(parts, mine_SL, group=model.groups.mpu.dp)
    return torch.cat(parts)[:num_samples].cpu()


def validation_nelbo(model: ModelEngine, blocks: np.ndarray, batch_size: int, seed: int) -> float:
    """Likelihood bound in nats per token on held-out blocks: one draw of (t, x_t, e) for each, t stratified.

    Collective. Blocks that do not fill the last global batch are left out.

    Raises:
        UserError: there are fewer blocks than data-parallel ranks.
    """
    dp_size = model.groups.dp_size
    unit = model.pipeline.micro_batch_unit
    batch_size = min(batch_size, len(blocks) // dp_size) // unit * unit
    if batch_size == 0:
        raise UserError(
            f"data.path has {len(blocks)} blocks of validation text, but {dp_size} data-parallel ranks need "
            f"{dp_size * unit} of them; give more text or shorten model.length."
        )
    per_rank = len(blocks) // (batch_size * dp_size)
    plan = BatchPlan(
        stream=TokenStream(ArrayCorpus(blocks), seed),
        states=CorruptedData(model.architecture),
        seed=seed,
        global_batch_size=per_rank * batch_size * dp_size,
        micro_batch_size=batch_size,
        dp_rank=model.groups.dp_rank,
        dp_size=dp_size,
        sampling_eps=1e-3,
    )
    architecture, device = model.architecture, model.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for index in range(plan.num_micro_batches):
        batch = plan.micro_batch(0, index)

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
        if terms_N is not None and model.groups.tp_rank == 0:
            total[0] += terms_N.sum()
            total[1] += batch.x_0_BL.numel()
    dist.all_reduce(total, group=model.groups.everyone)
    return (total[0] / total[1]).item()
