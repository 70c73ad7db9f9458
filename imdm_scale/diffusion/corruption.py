"""The forward process: what a text looks like at time t.

Shapes: B batch, L length (positions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Purpose, uniform
from .schedule import alpha


def corrupt(
    x_0_BL: Tensor,
    t_B: Tensor,
    mask_id: int,
    seed: int,
    sample_ids_B: Tensor,
    step: int,
    *,
    fixed_BL: Tensor | None = None,
) -> Tensor:
    """Draw x_t from q(x_t | x_0): every position becomes the mask with probability 1 - alpha(t) (MDLM, arXiv
    2406.07524). The noise e of the masked positions is drawn apart, by `noise.mask_noise`.

    Args:
        x_0_BL: int64 token ids.
        t_B: float64 times in [0, 1], one a sample.
        seed, sample_ids_B, step: name the draw, as in `noise.uniform`.
        fixed_BL: bool; positions that are never masked (a given prefix, padding).

    Returns:
        int64 (B, L).
    """
    u_BL = uniform(seed, sample_ids_B, Purpose.MASK, step, x_0_BL.shape[1], dtype=torch.float64)[..., 0]
    masked_BL = u_BL < (1.0 - alpha(t_B))[:, None]
    if fixed_BL is not None:
        masked_BL = masked_BL & ~fixed_BL
    return x_0_BL.masked_fill(masked_BL, mask_id)
