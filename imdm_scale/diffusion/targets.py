"""What the teacher shows the student in IM-SDTT: two of its small steps, for one large step of the student.

Shapes: B batch, L length (positions), D noise dimensions, V vocabulary, N masked positions of x_t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inverse_cdf import inverse_cdf
from .likelihood import forbid_mask
from .noise import Purpose, uniform
from .vocabulary import WHOLE, Vocabulary


@torch.no_grad()
def two_substep_targets(
    teacher_logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_t_BL: Tensor,
    noise_BLD: Tensor,
    t_B: Tensor,
    dt: float,
    *,
    mask_id: int,
    seed: int,
    sample_ids_B: Tensor,
    step: int,
    temperature: float = 1.0,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """The teacher's predictions along two reverse steps of size dt, with the same e in both (IM-SDTT: IMDM,
    arXiv 2605.10518, after SDTT, arXiv 2410.21035).

    SDTT records, for each position, the prediction it was revealed with, or the last one if it never was. The
    network does not see the time, so for two steps this is exactly: the first step's prediction where that
    step reveals, which it does with probability min(1, dt / t), and the second step's elsewhere. What the
    second step would reveal has no effect and is not drawn.

    Args:
        teacher_logits: (x_BL, noise_BLD, positions_N) -> raw logits_NV at the given row-major flat positions
            of (B, L). Called exactly twice on every process, the second time perhaps with no position at all,
            so that a network cut over processes stays in step.
        t_B: float64 times in (0, 1], one a sample.
        dt: the teacher's step, in (0, 1].
        seed, sample_ids_B, step: name the draws.
        temperature: > 0; divides the teacher's logits, in what it draws and in what it shows. Below 1 the teacher
            is sharper, as in knowledge distillation; 1 is the method of the papers.
        vocabulary: how the columns of the logits map to token ids.

    Returns:
        (N, V) logits, the mask id forbidden, for the masked positions of x_t in row-major order.
    """
    length = x_t_BL.shape[1]
    masked_BL = x_t_BL == mask_id
    positions_N = masked_BL.flatten().nonzero()[:, 0]

    def uniform_N(purpose: Purpose) -> Tensor:
        return uniform(seed, sample_ids_B, purpose, step, length, dtype=torch.float64).flatten()[positions_N]

    def predict(x_BL: Tensor, positions: Tensor) -> Tensor:
        return forbid_mask(teacher_logits(x_BL, noise_BLD, positions) / temperature, mask_id, vocabulary)

    target_NV = predict(x_t_BL, positions_N)
    reveal_probability_N = (dt / t_B)[positions_N // length]
    reveal_N = uniform_N(Purpose.REVEAL) < reveal_probability_N

    tokens = inverse_cdf(vocabulary.gather(target_NV[reveal_N]), uniform_N(Purpose.TOKEN)[reveal_N])
    x_s_BL = x_t_BL.flatten().index_put((positions_N[reveal_N],), tokens).view(x_t_BL.shape)
    target_NV[~reveal_N] = predict(x_s_BL, positions_N[~reveal_N])
    return target_NV
