"""Log-probabilities and the NELBO, over a whole or a cut vocabulary.

Shapes: N positions, V vocabulary (or the shard that `vocabulary` describes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .schedule import nelbo_weight
from .vocabulary import WHOLE, Vocabulary

FORBIDDEN_LOGIT = -1e6


def forbid_mask(logits_NV: Tensor, mask_id: int, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """A copy of the logits in which the mask id can not be predicted (the "zero masking
    probabilities" of MDLM's SUBS parameterisation, arXiv 2406.07524); differentiable, any leading shape.

    Only the shard that holds the mask id changes. In float16, which has no -1e6, its smallest number serves.
    """
    column = mask_id - vocabulary.first_id
    if not 0 <= column < logits_NV.shape[-1]:
        return logits_NV
    lowest = max(FORBIDDEN_LOGIT, torch.finfo(logits_NV.dtype).min)
    return logits_NV.index_fill(-1, torch.full((1,), column, device=logits_NV.device), lowest)


@torch.no_grad()
def log_softmax(logits_NV: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Log-probabilities (N, V), normalised over all shards, in float32 (float64 stays); no gradient."""
    x_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    x_NV = x_NV - vocabulary.max(x_NV)[:, None]
    return x_NV - vocabulary.sum(x_NV.exp()).log()[:, None]


class _CrossEntropy(torch.autograd.Function):
    """-log p(label) with the gradient p - onehot(label) of this process's columns."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, vocabulary: Vocabulary) -> Tensor:
        log_p_NV = log_softmax(logits_NV, vocabulary)
        column_N = labels_N - vocabulary.first_id
        held_N = (column_N >= 0) & (column_N < logits_NV.shape[-1])
        column_N = column_N.where(held_N, 0)
        picked_N = log_p_NV.gather(-1, column_N[:, None])[:, 0].where(held_N, 0.0)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_p_NV.exp_(), column_N, held_N)
            ctx.dtype = logits_NV.dtype
        return -vocabulary.sum(picked_N[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        p_NV, column_N, held_N = ctx.saved_tensors
        grad_NV = p_NV * grad_N[:, None]
        grad_NV.scatter_add_(-1, column_N[:, None], (-grad_N * held_N)[:, None])
        return grad_NV.to(ctx.dtype), None, None


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """-log p(label), in nats: (N,) in float32 (float64 stays), differentiable with respect to the logits.

    Args:
        labels_N: int64 ids of the whole vocabulary, each held by exactly one shard (the caller's promise: a
            check would cost a synchronisation at every update).
    """
    return _CrossEntropy.apply(logits_NV, labels_N, vocabulary)


def nelbo_terms(
    logits_NV: Tensor, labels_N: Tensor, t_N: Tensor, mask_id: int, vocabulary: Vocabulary = WHOLE
) -> Tensor:
    """What each masked position adds to the NELBO, in nats: (1/t) * -log x_theta(x_t, e)[x_0] (MDLM's
    continuous-time bound, arXiv 2406.07524, for alpha linear in t; the infinite mask leaves it as it is,
    because its keep and reset masses do not depend on the network).

    The caller sums over masked positions and divides by the number of tokens, unmasked ones included.

    Args:
        labels_N: int64 x_0 at the masked positions.
        t_N: float64 time of each position's sample.
    """
    loss_N = cross_entropy(forbid_mask(logits_NV, mask_id, vocabulary), labels_N, vocabulary)
    return loss_N * nelbo_weight(t_N).to(loss_N.dtype)
