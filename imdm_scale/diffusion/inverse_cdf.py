"""One token from logits and one uniform number.

The Gumbel trick with float32 uniforms biases masked diffusion towards low temperature (Zheng et al., "Masked
diffusion models are secretly time-agnostic masked models", arXiv 2409.02908), and so would a float32
cumulative sum: steps below 6e-8 vanish in it. Everything here is float64.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ELEMENTS = 2**24
"""Probabilities held at a time: 128 MiB of float64 for each of a few temporaries."""


def _keep_nucleus(p_NV: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al., "The
    curious case of neural text degeneration", arXiv 1904.09751); of equal tokens the lower ids come first.
    """
    sorted_NV, ids_NV = p_NV.sort(dim=-1, descending=True, stable=True)
    size_N = (sorted_NV.cumsum(-1) < top_p).sum(-1) + 1
    beyond_NV = torch.arange(p_NV.shape[-1], device=p_NV.device) >= size_N[:, None]
    return p_NV.scatter(-1, ids_NV, sorted_NV.masked_fill(beyond_NV, 0.0))


def inverse_cdf(logits_NV: Tensor, u_N: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The first id, in the order of ids, whose cumulative probability exceeds u times the total.

    Args:
        logits_NV: logits of any floating type; forbid the mask id first.
        u_N: float64 uniforms in [0, 1).
        temperature: > 0; divides the logits.
        top_p: in (0, 1]; nucleus, applied after the temperature. 1 keeps everything.

    Returns:
        int64 (N,); never an id of probability zero.
    """
    rows = max(1, MAX_ELEMENTS // logits_NV.shape[-1])
    ids = [
        _inverse_cdf(logits_RV, u_R, temperature, top_p)
        for logits_RV, u_R in zip(logits_NV.split(rows), u_N.split(rows), strict=True)
    ]
    return torch.cat(ids)


def _inverse_cdf(logits_NV: Tensor, u_N: Tensor, temperature: float, top_p: float) -> Tensor:
    p_NV = torch.softmax(logits_NV.double() / temperature, dim=-1)
    if top_p < 1.0:
        p_NV = _keep_nucleus(p_NV, top_p)
    # A parallel cumulative sum need not be monotone in its last bit, so that a search could land on an
    # impossible id: those are taken out instead.
    cdf_NV = p_NV.cumsum(-1).masked_fill(p_NV == 0.0, -1.0)
    threshold_N = u_N * cdf_NV.amax(-1)
    return (cdf_NV > threshold_N[:, None]).to(torch.uint8).argmax(-1)
