"""What tells whether training does what it should, measured every `log.diagnose_every` updates.

Shapes: B batch, L positions, D noise dimensions, N masked positions, V one shard of the vocabulary, R positions of
one chunk, E draws of the noise, P positions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.diffusion.inverse_cdf import MAX_ELEMENTS, argmax
from imdm_scale.diffusion.likelihood import forbid_mask, log_softmax
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.parallel.engine import ModelEngine

BINS = 8
"""Of the times t in (0, 1], and of the order in which a sample's positions are revealed."""
MOST_POSITIONS = 4
"""Positions of a text at which the use of the noise is measured, evenly spaced."""


class LossMeter:
    """Sums over the masked positions of an update, this rank's; `result` adds up those of all ranks.

    - `loss_by_t`: mean loss of a position, by the time t of its sample, in `BINS` equal parts of (0, 1].
    - `loss_by_order`: the same by the order in which a reverse process reveals the positions: the first part are those
      that come next, whose own time is close below t, the last part those that come last.
    - `student_entropy`: of the prediction at a masked position, mean, in nats.
    - `accuracy`: share of the masked positions whose likeliest token is the clean text's. Meaningful where the
      states are corrupted data.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums_bins = torch.zeros(4, BINS, dtype=torch.float64, device=device)
        """Loss and count by t; loss and count by order."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Entropy, hits, count."""

    @torch.no_grad()
    def add(
        self,
        micro_batch: MicroBatch,
        losses_N: Tensor,
        logits_NV: Tensor,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> None:
        """Take in one micro-batch. Collective over the shards of the vocabulary."""
        device = logits_NV.device
        t_N = micro_batch.t_N.to(device)
        order_N = 1.0 - micro_batch.reveal_N.to(device) / t_N
        losses_N = losses_N.detach().double()
        ones_N = torch.ones_like(losses_N)
        for row, part_N in ((0, t_N), (2, order_N)):
            bin_N = (part_N * BINS).long().clamp(0, BINS - 1)
            self.sums_bins[row].index_add_(0, bin_N, losses_N)
            self.sums_bins[row + 1].index_add_(0, bin_N, ones_N)
        rows = max(1, MAX_ELEMENTS // logits_NV.shape[-1])
        labels_N = micro_batch.labels_N.to(device)
        for logits_RV, labels_R in zip(logits_NV.split(rows), labels_N.split(rows), strict=True):
            allowed_RV = forbid_mask(logits_RV, mask_id, vocabulary)
            hits_R = argmax(allowed_RV, vocabulary) == labels_R
            entropy_R = entropy(allowed_RV, vocabulary)
            self.sums += torch.stack([entropy_R.sum(), hits_R.sum(), torch.ones_like(entropy_R).sum()])

    def result(self, group: dist.ProcessGroup, counts: bool) -> dict[str, float | list[float | None]]:
        """The measures over all ranks. Collective over `group`.

        Args:
            counts: whether this rank's sums count: of ranks that saw the same positions, one must.
        """
        for sums in (self.sums_bins, self.sums):
            if not counts:
                sums.zero_()
            dist.all_reduce(sums, group=group)
        by_t, by_order = (
            [total / count if count else None for total, count in self.sums_bins[row : row + 2].T.tolist()]
            for row in (0, 2)
        )
        entropy_sum, hits, count = self.sums.tolist()
        return {
            "loss_by_t": by_t,
            "loss_by_order": by_order,
            "student_entropy": entropy_sum / max(count, 1),
            "accuracy": hits / max(count, 1),
        }


@torch.no_grad()
def entropy(logits_NV: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Entropy in nats of each row's distribution, float64 (N,). Collective over the shards of the vocabulary."""
    log_p_NV = log_softmax(logits_NV.double(), vocabulary)
    return -vocabulary.sum(log_p_NV.exp() * log_p_NV)


def noise_information(model: ModelEngine, seed: int, step: int, num_draws: int) -> float:
    """I(token; e) = E_e KL(p(.|all masked, e) || E_e p(.|all masked, e)), in nats per token: how much the
    network's prediction follows the noise. 0 for a network that ignores it, as a masked diffusion model does.

    The mean over e is taken over the same draws, so that the estimate never exceeds ln(num_draws), and a network
    that maps every e to a token of its own cannot show more. Collective over the network's ranks; the same for
    every layout.

    Args:
        num_draws: E; rounded up to a multiple of what the replicas compute at a time.
    """
    architecture, groups = model.architecture, model.groups
    unit = groups.dp_size * model.pipeline.micro_batch_unit
    per_rank = -(-num_draws // unit) * model.pipeline.micro_batch_unit
    length, device = architecture.length, model.device
    x_EL = torch.full((per_rank, length), architecture.mask_token_id)
    num_positions = min(MOST_POSITIONS, length)
    where_P = ((torch.arange(num_positions) + 0.5) * length / num_positions).long()
    positions_N = (torch.arange(per_rank)[:, None] * length + where_P).flatten()
    draws_E = groups.dp_rank * per_rank + torch.arange(per_rank)

    def noise_of(rows: slice) -> Tensor:
        return mask_noise(
            seed,
            draws_E[rows].to(device),
            step,
            length,
            architecture.noise_dim,
            kind=architecture.noise_kind,
            scale=architecture.noise_scale,
        )

    def log_probabilities(output: Tensor, which: slice) -> Tensor:
        logits_NV = forbid_mask(model.logits(output), architecture.mask_token_id, model.vocabulary)
        return log_softmax(logits_NV.double(), model.vocabulary)

    log_p_NV = model.infer(x_EL, noise_of, positions_N, log_probabilities)
    result = torch.zeros(1, dtype=torch.float64, device=device)
    if log_p_NV is not None:
        p_EPV = log_p_NV.exp().unflatten(0, (per_rank, len(where_P)))
        mean_PV = p_EPV.mean(0) / groups.dp_size
        dist.all_reduce(mean_PV, group=groups.mpu.dp)
        entropies_E = -model.vocabulary.sum(p_EPV.flatten(0, 1) * log_p_NV)
        mean_entropy = entropies_E.mean() / groups.dp_size
        dist.all_reduce(mean_entropy, group=groups.mpu.dp)
        log_mean_PV = mean_PV.clamp_min(torch.finfo(mean_PV.dtype).tiny).log()
        result[0] = -model.vocabulary.sum(mean_PV * log_mean_PV).mean() - mean_entropy
    return model.from_last_stage(result if log_p_NV is not None else None, (1,), torch.float64).item()
