"""What the teacher shows the student in IM-SDTT: two of its small steps, for one large step of the student.

Shapes: B batch, L length (positions), D noise dimensions, V vocabulary, N masked positions of x_t, R of them
revealed and K kept by the first step.
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
def two_substeps(
    predict: Callable[[Tensor, Tensor], Tensor | None],
    draw: Callable[[Tensor | None, Tensor], Tensor],
    x_t_BL: Tensor,
    t_B: Tensor,
    dt: float,
    *,
    mask_id: int,
    seed: int,
    sample_ids_B: Tensor,
    step: int,
) -> Tensor | None:
    """The teacher's predictions along two reverse steps of size dt, with the same e in both (IM-SDTT: IMDM,
    arXiv 2605.10518, after SDTT, arXiv 2410.21035).

    SDTT records, for each position, the prediction it was revealed with, or the last one if it never was. The
    network does not see the time, so for two steps this is exactly: the first step's prediction where that
    step reveals, which it does with probability min(1, dt / t), and the second step's elsewhere. What the
    second step would reveal has no effect and is not drawn.

    All shapes are known before the first prediction is asked for, so nothing here waits for the network, whose
    device may be another than that of x_t.

    Args:
        predict: (x_BL, positions_N) -> (N, ...), one row (logits, or the hidden state that they come from) a
            row-major flat position of (B, L), which this function may overwrite; None on a process that does
            not hold the end of the network. Called exactly twice on every process, the second time perhaps
            with no position at all, so that a network cut over processes stays in step.
        draw: (rows or None, u_N) -> int64 ids_N, one token a row from float64 uniforms, on every process the
            same. Called once.
        t_B: float64 times in (0, 1], one a sample.
        dt: the teacher's step, in (0, 1].
        seed, sample_ids_B, step: name the draws.

    Returns:
        The rows of the masked positions of x_t in row-major order, or None where `predict` gives None.
    """
    length = x_t_BL.shape[1]
    positions_N = (x_t_BL == mask_id).flatten().nonzero()[:, 0]

    def uniform_N(purpose: Purpose) -> Tensor:
        return uniform(seed, sample_ids_B, purpose, step, length, dtype=torch.float64).flatten()[positions_N]

    reveal_N = uniform_N(Purpose.REVEAL) < (dt / t_B)[positions_N // length]
    revealed_R, kept_K = reveal_N.nonzero()[:, 0], (~reveal_N).nonzero()[:, 0]
    u_R = uniform_N(Purpose.TOKEN)[revealed_R]

    rows = predict(x_t_BL, positions_N)
    ids_R = draw(None if rows is None else rows[revealed_R.to(rows.device)], u_R)
    place_R = positions_N[revealed_R].to(ids_R.device)
    x_s_BL = x_t_BL.to(ids_R.device).flatten().index_put((place_R,), ids_R).view(x_t_BL.shape)
    second_rows = predict(x_s_BL, positions_N[kept_K])
    if rows is None or second_rows is None:
        return None
    return rows.index_copy_(0, kept_K.to(rows.device), second_rows)


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
    """`two_substeps` of a teacher whose logits are at hand.

    Args:
        teacher_logits: (x_BL, noise_BLD, positions_N) -> raw logits_NV at the given row-major flat positions
            of (B, L).
        noise_BLD: e, for both steps.
        temperature: > 0; divides the teacher's logits, in what it draws and in what it shows. Below 1 the teacher
            is sharper, as in knowledge distillation; 1 is the method of the papers.
        vocabulary: how the columns of the logits map to token ids.

    Returns:
        (N, V) logits, the mask id forbidden, for the masked positions of x_t in row-major order.
    """

    def predict(x_BL: Tensor, positions_N: Tensor) -> Tensor:
        logits_NV = teacher_logits(x_BL, noise_BLD, positions_N)
        return forbid_mask(logits_NV / temperature, mask_id, vocabulary)

    def draw(logits_RV: Tensor | None, u_R: Tensor) -> Tensor:
        assert logits_RV is not None
        return inverse_cdf(logits_RV, u_R, vocabulary=vocabulary)

    target_NV = two_substeps(
        predict, draw, x_t_BL, t_B, dt, mask_id=mask_id, seed=seed, sample_ids_B=sample_ids_B, step=step
    )
    assert target_NV is not None
    return target_NV
