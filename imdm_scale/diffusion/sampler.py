"""Few-step generation: the reverse chain, from all masks or around given tokens.

Shapes: B batch, L length (positions), D noise dimensions, V vocabulary, N revealed positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .coupling import coordinates, noise_of_masked, trajectory
from .inverse_cdf import argmax, inverse_cdf
from .likelihood import forbid_mask
from .noise import Purpose, mask_noise, uniform
from .posterior import reverse_masses
from .schedule import alpha
from .vocabulary import WHOLE, Vocabulary

SAMPLERS = ("ancestral", "coupled", "coupled_argmax")
"""Ancestral sampling draws its own uniforms; the coupled samplers read them from the noise e (`coupling.py`), so
that the text is a function of e. Where a network was trained to know the token from e, `coupled_argmax` takes its
most likely one."""


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample; the network and the text to complete are given apart."""

    num_steps: int
    """Reverse steps, which is also the number of network evaluations."""
    temperature: float = 1.0
    """Divides the logits of the token distribution. The masses of keeping and resetting are not touched (the
    authors' code tempers the whole posterior, so that it also changes when positions are revealed)."""
    top_p: float = 1.0
    """Nucleus of the token distribution; 1 keeps everything."""
    greedy_last_step: bool = False
    """Take the most likely token in the last step instead of drawing one."""
    fixed_noise: bool = False
    """Keep e over the whole trajectory, instead of redrawing it where the posterior resets it. The coupled samplers
    always do."""
    sampler: str = "ancestral"
    """One of `SAMPLERS`."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"the sampler is {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature is {self.temperature}; it must be above 0 (or use greedy_last_step)"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


@torch.no_grad()
def sample_by(
    draw: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor],
    x_t_BL: Tensor,
    *,
    settings: SamplerSettings,
    seed: int,
    sample_ids_B: Tensor,
    mask_id: int,
    noise_dim: int,
    noise_kind: str = "uniform",
    noise_scale: float = 1.0,
    start_time: float | Tensor = 1.0,
) -> Tensor:
    """Fill the masked positions of x_t, by ancestral (IMDM, arXiv 2605.10518) or coupled sampling.

    The grid is t_i = start_time * (1 - i / num_steps). Step i of ancestral sampling reveals, keeps or resets each
    masked position by the three-way posterior from t_i to t_{i+1}; the last step reveals all. With a single step
    nothing is ever reset. A coupled sampler draws e once, as ancestral sampling draws its first one, given that
    the positions are masked at start_time, and then follows `coupling.trajectory`. Each draw is counter-based, so
    a sample depends on its id, not on its batch.

    Args:
        draw: (x_BL, noise_BLD, positions_N, u_N, greedy) -> ids_N, the tokens of the row-major flat positions
            of (B, L) that a step reveals, from one float64 uniform each, or the most likely ones if `greedy`
            (as `draw_tokens` does from their logits), on every process the same. Called exactly `num_steps`
            times on each, perhaps with no position at all, so that a network cut over processes stays in
            step. D may be 0, but not below 2 for a coupled sampler.
        x_t_BL: int64; positions that are not `mask_id` are carried over unchanged, wherever they are.
        settings: the temperature and the nucleus are for `draw` to heed.
        seed, sample_ids_B: name the draws.
        start_time: the time of x_t, in (0, 1]; a number or float64 (B,).

    Returns:
        int64 (B, L) without masks.

    Raises:
        ValueError: a start time outside (0, 1], an unknown `noise_kind`, or too little noise to couple.
    """
    start_B = torch.as_tensor(start_time, dtype=torch.float64, device=x_t_BL.device).expand(x_t_BL.shape[0])
    if not bool(((start_B > 0.0) & (start_B <= 1.0)).all()):
        raise ValueError(f"start_time must lie in (0, 1], not {start_time}")
    length = x_t_BL.shape[1]
    num_steps = settings.num_steps

    def fresh_noise(step: int) -> Tensor:
        return mask_noise(seed, sample_ids_B, step, length, noise_dim, kind=noise_kind, scale=noise_scale)

    def uniform_BL(purpose: Purpose, step: int) -> Tensor:
        return uniform(seed, sample_ids_B, purpose, step, length, dtype=torch.float64)[..., 0]

    x_BL = x_t_BL
    noise_BLD = fresh_noise(0)
    if settings.sampler != "ancestral":
        greedy = [settings.sampler == "coupled_argmax"] * num_steps
        greedy[-1] |= settings.greedy_last_step
        greedy_steps = iter(greedy)
        coupled_BLD = noise_of_masked(noise_BLD, start_B, noise_kind, noise_scale)
        return trajectory(
            lambda x_BL, positions_N, u_N: draw(x_BL, coupled_BLD, positions_N, u_N, next(greedy_steps)),
            x_BL,
            coordinates(coupled_BLD, noise_kind, noise_scale),
            start_B,
            num_steps,
            mask_id=mask_id,
        )
    for i in range(num_steps):
        last = i == num_steps - 1
        t_B1 = start_B[:, None] * (1.0 - i / num_steps)
        s_B1 = start_B[:, None] * (1.0 - (i + 1) / num_steps)
        masses = reverse_masses(alpha(t_B1), alpha(s_B1))
        masked_BL = x_BL == mask_id
        u_BL = uniform_BL(Purpose.REVEAL, i)
        reveal_BL = masked_BL if last else masked_BL & (u_BL < masses.unmask)

        positions_N = reveal_BL.flatten().nonzero()[:, 0]
        u_N = uniform_BL(Purpose.TOKEN, i).flatten()[positions_N]
        ids_N = draw(x_BL, noise_BLD, positions_N, u_N, last and settings.greedy_last_step)
        x_BL = x_BL.flatten().index_put((positions_N,), ids_N).view(x_BL.shape)

        if not (last or settings.fixed_noise):
            reset_BL = masked_BL & (u_BL >= masses.unmask + masses.keep)
            noise_BLD = torch.where(reset_BL[..., None], fresh_noise(i + 1), noise_BLD)
    return x_BL


def draw_tokens(
    logits_NV: Tensor,
    u_N: Tensor,
    *,
    mask_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    vocabulary: Vocabulary = WHOLE,
    rank_V: Tensor | None = None,
) -> Tensor:
    """The tokens of the positions with these raw logits: int64 (N,), the same on all shards, never the mask.

    Collective over the shards of the vocabulary.

    Args:
        u_N: float64 uniforms in [0, 1).
        greedy: take the most likely tokens instead; uniforms, temperature and nucleus then have no effect.
        rank_V: int64 places of these columns in the order of the vocabulary; None is the order of ids.
    """
    logits_NV = forbid_mask(logits_NV, mask_id, vocabulary)
    if greedy:
        return argmax(logits_NV, vocabulary)
    return inverse_cdf(
        logits_NV, u_N, temperature=temperature, top_p=top_p, vocabulary=vocabulary, rank_V=rank_V
    )


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    x_t_BL: Tensor,
    *,
    settings: SamplerSettings,
    seed: int,
    sample_ids_B: Tensor,
    mask_id: int,
    noise_dim: int,
    noise_kind: str = "uniform",
    noise_scale: float = 1.0,
    start_time: float | Tensor = 1.0,
    rank_V: Tensor | None = None,
) -> Tensor:
    """`sample_by` with a network that is whole on one process.

    Args:
        predict: (x_BL, noise_BLD) -> raw logits_BLV; called exactly `num_steps` times.
        rank_V: int64 places of the tokens in the order of the vocabulary; None is the order of ids. The other
            arguments, the result and the errors are those of `sample_by`.
    """

    def draw(x_BL: Tensor, noise_BLD: Tensor, positions_N: Tensor, u_N: Tensor, greedy: bool) -> Tensor:
        logits_NV = predict(x_BL, noise_BLD).flatten(0, 1)[positions_N]
        return draw_tokens(
            logits_NV,
            u_N,
            mask_id=mask_id,
            temperature=settings.temperature,
            top_p=settings.top_p,
            greedy=greedy,
            rank_V=rank_V,
        )

    return sample_by(
        draw,
        x_t_BL,
        settings=settings,
        seed=seed,
        sample_ids_B=sample_ids_B,
        mask_id=mask_id,
        noise_dim=noise_dim,
        noise_kind=noise_kind,
        noise_scale=noise_scale,
        start_time=start_time,
    )
