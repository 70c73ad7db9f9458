"""The reverse posterior of the infinite mask: reveal, stay masked with the same e, or with a fresh e.

A masked state is (m, e). Forward from s to t > s a state survives with probability a = alpha_t / alpha_s and
otherwise becomes (m, fresh e), also where it was a mask already. Bayes' rule, for q(x_s | x_t = (m, e), x_0),
gives weights alpha_s (1 - a), (1 - alpha_s) a and (1 - alpha_s) (1 - a), whose sum is 1 - alpha_t. Keep and
reset together are MDLM's probability of staying masked (arXiv 2406.07524).

Shapes: N positions, V vocabulary. Schedules are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masses(NamedTuple):
    """What a reverse step does to a masked position; the three sum to 1."""

    unmask: Tensor
    """(alpha_s - alpha_t) / (1 - alpha_t): becomes a token."""
    keep: Tensor
    """(a - alpha_t) / (1 - alpha_t), a = alpha_t / alpha_s: stays masked with the same e."""
    reset: Tensor
    """(1 - a) (1 - alpha_s) / (1 - alpha_t): stays masked with a fresh e."""


def reverse_masses(alpha_t: Tensor, alpha_s: Tensor) -> Masses:
    """Masses of the reverse step from t to s < t (IMDM, arXiv 2605.10518). Any common shape;
    alpha_t < 1.
    """
    masked_t = 1.0 - alpha_t
    survives = alpha_t / alpha_s
    return Masses(
        unmask=(alpha_s - alpha_t) / masked_t,
        keep=survives * (1.0 - alpha_s) / masked_t,
        reset=(1.0 - survives) * (1.0 - alpha_s) / masked_t,
    )


def reverse_posterior(probs_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor) -> Tensor:
    """The reverse step's law at masked positions, with x_0 replaced by the network's prediction.

    Args:
        probs_NV: the prediction x_theta(x_t, e); 0 at the mask id.

    Returns:
        (N, V + 2): the probability of each token, then of keeping e, then of redrawing it. The sampler draws
        from this law in two stages, reveal or not and then which token.
    """
    unmask_N, keep_N, reset_N = reverse_masses(alpha_t_N, alpha_s_N)
    return torch.cat([unmask_N[:, None] * probs_NV, keep_N[:, None], reset_N[:, None]], dim=-1)
