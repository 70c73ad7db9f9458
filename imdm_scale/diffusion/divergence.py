"""How far the student's distribution is from the teacher's, with gradients written by hand.

With p = softmax(student logits) and q = softmax(teacher logits), every divergence here is a sum over the
vocabulary of terms in (p, q), and its gradient with respect to the student's logits is

    p f - p sum(p f),    f = d loss / d p,

where f may be shifted by any constant. So each divergence states only its terms and p f; one function does
the rest. Where both logits are the same bits, p f is exactly 0, hence so are the loss and the gradient.

Shapes: N positions, V vocabulary (or the shard that `vocabulary` describes). Values in nats where a logarithm
is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .likelihood import log_softmax
from .vocabulary import WHOLE, Vocabulary

Terms = tuple[Tensor, Tensor]


def _kl_backward(log_p_NV: Tensor, log_q_NV: Tensor) -> Terms:
    """KL(student || teacher) = sum p (log p - log q); f = log p - log q (the constant 1 dropped)."""
    p_times_ratio_NV = log_p_NV.exp() * (log_p_NV - log_q_NV)
    return p_times_ratio_NV, p_times_ratio_NV


def _kl_forward(log_p_NV: Tensor, log_q_NV: Tensor) -> Terms:
    """KL(teacher || student) = sum q (log q - log p); f = 1 - q/p (1 added, so that p f is 0 at q = p)."""
    q_NV = log_q_NV.exp()
    return q_NV * (log_q_NV - log_p_NV), log_p_NV.exp() - q_NV


def _jsd(log_p_NV: Tensor, log_q_NV: Tensor) -> Terms:
    """Jensen-Shannon divergence, 1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q)/2; f = 1/2 (log p - log m).

    With d = log q - log p, log m - log p = max(d, 0) + log(1/2 + exp(-|d|)/2), which is exactly 0 at d = 0
    and neither overflows nor turns into 0/0 where an entry is forbidden.
    """
    d_NV = log_q_NV - log_p_NV
    common_NV = torch.log1p(0.5 * torch.expm1(-d_NV.abs()))
    p_f_NV = -0.5 * log_p_NV.exp() * (d_NV.clamp(min=0.0) + common_NV)
    q_part_NV = -0.5 * log_q_NV.exp() * ((-d_NV).clamp(min=0.0) + common_NV)
    return p_f_NV + q_part_NV, p_f_NV


def _tvd(log_p_NV: Tensor, log_q_NV: Tensor) -> Terms:
    """Total variation distance, 1/2 sum |p - q|; f = 1/2 sign(p - q)."""
    p_NV = log_p_NV.exp()
    gap_NV = p_NV - log_q_NV.exp()
    return 0.5 * gap_NV.abs(), 0.5 * p_NV * gap_NV.sign()


def _mse(log_p_NV: Tensor, log_q_NV: Tensor) -> Terms:
    """Squared error of the probabilities, sum (p - q)^2; f = 2 (p - q)."""
    p_NV = log_p_NV.exp()
    gap_NV = p_NV - log_q_NV.exp()
    return gap_NV.square(), 2.0 * p_NV * gap_NV


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Terms]] = {
    "kl_backward": _kl_backward,
    "kl_forward": _kl_forward,
    "jsd": _jsd,
    "tvd": _tvd,
    "mse": _mse,
}
"""The divergences by name; each maps (log p, log q) to (terms of the loss, p f), all (N, V)."""


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, name: str, vocabulary: Vocabulary
    ) -> Tensor:
        log_p_NV = log_softmax(student_NV, vocabulary)
        terms_NV, p_f_NV = DIVERGENCES[name](log_p_NV, log_softmax(teacher_NV, vocabulary))
        if ctx.needs_input_grad[0]:
            total_N = vocabulary.sum(p_f_NV)
            ctx.save_for_backward(p_f_NV - log_p_NV.exp() * total_N[:, None])
            ctx.dtype = student_NV.dtype
        return vocabulary.sum(terms_NV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_NV,) = ctx.saved_tensors
        return (grad_NV * grad_N[:, None]).to(ctx.dtype), None, None, None


def divergence(
    name: str, student_logits_NV: Tensor, teacher_logits_NV: Tensor, vocabulary: Vocabulary = WHOLE
) -> Tensor:
    """The divergence called `name` at each position: (N,) in float32 (float64 stays).

    Differentiable with respect to the student's logits only. Forbid the mask id on both sides first
    (`likelihood.forbid_mask`). Rounding may leave a value a few 1e-7 below 0 in float32.

    Raises:
        ValueError: no divergence has that name.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"the divergence is {name!r}; choose one of {', '.join(DIVERGENCES)}")
    return _Divergence.apply(student_logits_NV, teacher_logits_NV, name, vocabulary)
