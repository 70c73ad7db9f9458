"""Noise coupling: the mask's noise e carries the randomness of the sampler.

Two coordinates of each position's e are read as uniforms: u from dimension 0 decides which token the position
becomes (by inverse CDF), tau from dimension 1 decides when it is revealed. With alpha(t) = 1 - t a masked
diffusion model reveals every position at a time of its own, uniform on [0, 1) and independent of the tokens.
So a trajectory that reveals where tau >= s on its way down to time s has exactly the law of ancestral sampling,
while its text has become a function of e. (With MDLM's alpha(t) = 1 - (1 - EPS0) t the reverse step reveals with
the same probability (t - s)/t, so the law is the same there.) At time t exactly the positions with tau < t are
masked.

Every trajectory here asks for tokens a fixed number of times, whatever the data, so that networks that are cut
over processes stay in step; and which positions are revealed when is decided by tau alone, on the device of x,
before the first token is asked for.

Shapes: B batch, L length (positions), D noise dimensions, N positions that a step reveals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Tokens = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BL, positions_N, u_N) -> int64 ids_N, on every process the same: tokens of the row-major flat positions of
(B, L), in ascending order, drawn by one float64 uniform each. `positions_N` may be empty. It and `u_N` are on the
device of the first state; x_BL is from the second call on where the tokens are."""

GRIDS = ("time", "order", "position")
"""How the steps of a trajectory divide it: by equal spans of time, or by equal numbers of positions, these in the order
of their times or from left to right."""
LARGEST_BELOW_ONE = 1.0 - 2.0**-53


class Coordinates(NamedTuple):
    """What a position's noise says; both float64 in [0, 1)."""

    u: Tensor
    """Which token the position becomes."""
    tau: Tensor
    """The time at which it is revealed."""


def coordinates(noise: Tensor, kind: str = "uniform", scale: float = 1.0) -> Coordinates:
    """The uniforms u and tau that the first two dimensions of the noise e carry.

    Args:
        noise: float32 (..., D) as `noise.mask_noise` draws it, D at least 2. Narrower types have lost the digits
            that tell tokens apart.
        kind, scale: the noise's law. "uniform" on [-scale, scale) is read as (e / scale + 1) / 2, exactly (24
            bits) where the scale is a power of 2; "normal" by its distribution function.

    Returns:
        Two tensors of the leading shape.

    Raises:
        ValueError: fewer than two dimensions, or a `kind` that is neither of the two.
    """
    if noise.shape[-1] < 2:
        raise ValueError(
            f"noise of {noise.shape[-1]} dimensions cannot say which token and when; coupling reads two, so "
            "noise_dim must be at least 2"
        )
    return Coordinates(*uniform_of(noise[..., :2], kind, scale).unbind(-1))


def uniform_of(noise: Tensor, kind: str = "uniform", scale: float = 1.0) -> Tensor:
    """Numbers of the noise's law as float64 uniforms on [0, 1), by its distribution function.

    Raises:
        ValueError: a `kind` other than "uniform" and "normal".
    """
    e = noise.double() / scale
    if kind == "uniform":
        uniforms = (e + 1.0) / 2.0
    elif kind == "normal":
        uniforms = torch.special.ndtr(e)
    else:
        raise ValueError(f"the noise's kind must be 'uniform' or 'normal', not {kind!r}")
    return uniforms.clamp(0.0, LARGEST_BELOW_ONE)


def noise_of_masked(noise_BLD: Tensor, t_B: Tensor, kind: str = "uniform", scale: float = 1.0) -> Tensor:
    """Fresh noise made into that of positions which are masked at time t: the law of e given tau < t.

    tau, uniform on [0, 1), becomes t tau; every other dimension stays as it is, and so does all noise where t is
    1.

    Args:
        noise_BLD: float32, D at least 2.
        t_B: float64 times in (0, 1], one a sample.
        kind, scale: the noise's law.

    Returns:
        float32 (B, L, D).

    Raises:
        ValueError: as `coordinates`.
    """
    tau_BL = coordinates(noise_BLD, kind, scale).tau * t_B[:, None]
    e_BL = 2.0 * tau_BL - 1.0 if kind == "uniform" else torch.special.ndtri(tau_BL)
    when_BL = torch.where(t_B[:, None] < 1.0, (scale * e_BL).to(noise_BLD.dtype), noise_BLD[..., 1])
    return torch.cat([noise_BLD[..., :1], when_BL[..., None], noise_BLD[..., 2:]], dim=-1)


def corrupt_coupled(
    x_0_BL: Tensor, tau_BL: Tensor, t_B: Tensor, mask_id: int, *, fixed_BL: Tensor | None = None
) -> Tensor:
    """The state of a coupled trajectory to x_0 at time t: masked where tau < t.

    Over the law of e it is a draw from q(x_t | x_0) with alpha(t) = 1 - t.

    Args:
        x_0_BL: int64 token ids: data, or the text to which `trajectory` has led, whose earlier states this
            gives.
        tau_BL: float64 times of revealing.
        t_B: float64 times in [0, 1], one a sample.
        fixed_BL: bool; positions that are never masked (a given prefix, padding).

    Returns:
        int64 (B, L).
    """
    masked_BL = tau_BL < t_B[:, None]
    if fixed_BL is not None:
        masked_BL = masked_BL & ~fixed_BL
    return x_0_BL.masked_fill(masked_BL, mask_id)


def trajectory(
    tokens: Tokens,
    x_t_BL: Tensor,
    noise: Coordinates,
    t_B: Tensor,
    num_steps: int,
    *,
    mask_id: int,
    grid: str = "time",
) -> Tensor:
    """The text to which a network's coupled trajectory leads from x_t.

    Args:
        grid: one of `GRIDS`. On the grid of time, t (1 - i / num_steps), the law of the text is that of ancestral
            sampling in as many steps. On that of order each step reveals as many positions as any other, in the order
            of their times: with a step for each masked position every one is alone, which is the limit of infinitely
            many steps of the grid of time. On that of position they are revealed from left to right, whatever their
            times, so that the text is a function of u alone: the law of a network that completes texts in any order
            does not depend on it.
        tokens: called exactly `num_steps` times.
        x_t_BL: int64; positions that are not `mask_id` are carried over unchanged.
        noise: u and tau, (B, L) each. A masked position with tau >= t is revealed by the first step.
        t_B: float64 times of x_t in (0, 1].

    Returns:
        int64 (B, L) without masks, where the tokens are. `corrupt_coupled` gives the states on the way to it.

    Raises:
        ValueError: fewer than one step.
    """
    _check_steps(num_steps)
    if grid == "position":
        length = x_t_BL.shape[1]
        falling_L = torch.arange(length, 0, -1, dtype=noise.tau.dtype, device=noise.tau.device) / (length + 1)
        noise = Coordinates(noise.u, falling_L.expand_as(noise.tau))
    until: Iterable[Tensor]
    if grid != "time":
        until = _even_shares(noise.tau, x_t_BL == mask_id, num_steps)
    else:
        until = (t_B * (1.0 - i / num_steps) for i in range(1, num_steps + 1))
    return _reveal(tokens, x_t_BL, noise, until, mask_id)


def trajectory_labels(
    tokens: Tokens,
    x_t_BL: Tensor,
    noise: Coordinates,
    t_B: Tensor,
    num_steps: int,
    *,
    mask_id: int,
    grid: str = "time",
) -> Tensor:
    """What a teacher's coupled trajectory puts at the masked positions of x_t: the labels of a student that is to
    predict the end of the trajectory from (x_t, e) at once.

    Returns:
        int64 (N,), the masked positions in row-major order. The arguments and the error are those of
        `trajectory`.
    """
    text_BL = trajectory(tokens, x_t_BL, noise, t_B, num_steps, mask_id=mask_id, grid=grid)
    return _at_masks(text_BL, x_t_BL, mask_id)


def progressive_labels(
    tokens: Tokens,
    x_t_BL: Tensor,
    noise: Coordinates,
    t_B: Tensor,
    dt: float,
    *,
    mask_id: int,
) -> Tensor:
    """The tokens along two coupled reverse steps of size dt, with the same e in both: SDTT's two sub-steps (arXiv
    2410.21035, `targets.two_substeps`) with drawn tokens in the place of distributions.

    A position that the first step reveals (tau >= t - dt) gets its token there, by the prediction at x_t; every
    other one the token that the second step's prediction holds for its u, whether that step reveals it or not.

    Args:
        tokens: called exactly twice.
        x_t_BL, noise, t_B: as for `trajectory`.
        dt: the teacher's step, in (0, 1].

    Returns:
        int64 (N,), the masked positions of x_t in row-major order.
    """
    until = (t_B - dt, torch.zeros_like(t_B))
    return _at_masks(_reveal(tokens, x_t_BL, noise, until, mask_id), x_t_BL, mask_id)


def rollout(
    tokens: Tokens,
    x_1_BL: Tensor,
    noise: Coordinates,
    t_B: Tensor,
    num_steps: int,
    *,
    mask_id: int,
) -> Tensor:
    """The state at time t of a network's own trajectory from pure mask, on the grid 1 - (1 - t) i / num_steps: a
    state that the network visits when it samples.

    Nothing but u and tau is read of the noise. With any independent uniforms in their place this is ancestral
    sampling, stopped at t.

    Args:
        tokens: called exactly `num_steps` times.
        x_1_BL: int64; `mask_id` everywhere but at given positions (BOS, a prefix), which stay as they are.
        noise: u and tau, (B, L) each.
        t_B: float64 times in [0, 1], one a sample.

    Returns:
        int64 (B, L), where the tokens are; of the positions that were masked exactly those with tau < t still
        are.

    Raises:
        ValueError: fewer than one step.
    """
    _check_steps(num_steps)
    until = [1.0 - (1.0 - t_B) * i / num_steps for i in range(1, num_steps)]
    return _reveal(tokens, x_1_BL, noise, [*until, t_B], mask_id)


def _reveal(
    tokens: Tokens, x_BL: Tensor, noise: Coordinates, until: Iterable[Tensor], mask_id: int
) -> Tensor:
    """One step for each of the times `until`, (B,) each: the positions with tau at or above it get their tokens."""
    masked_BL = x_BL == mask_id
    for s_B in until:
        reveal_BL = masked_BL & (noise.tau >= s_B[:, None])
        positions_N = reveal_BL.flatten().nonzero()[:, 0]
        ids_N = tokens(x_BL, positions_N, noise.u.flatten()[positions_N])
        place_N = positions_N.to(ids_N.device)
        x_BL = x_BL.to(ids_N.device).flatten().index_put((place_N,), ids_N).view(x_BL.shape)
        masked_BL = masked_BL & ~reveal_BL
    return x_BL


def _even_shares(tau_BL: Tensor, masked_BL: Tensor, num_steps: int) -> Iterator[Tensor]:
    """Times (B,) down to which each step reveals, so that of M masked positions ceil(M i / num_steps) are revealed
    after step i."""
    falling_BL = tau_BL.masked_fill(~masked_BL, -1.0).sort(dim=1, descending=True).values
    counts_B = masked_BL.sum(1)
    for i in range(1, num_steps + 1):
        revealed_B = (counts_B * i + num_steps - 1) // num_steps
        yield falling_BL.gather(1, (revealed_B - 1).clamp(min=0)[:, None])[:, 0]


def _at_masks(x_BL: Tensor, x_t_BL: Tensor, mask_id: int) -> Tensor:
    positions_N = (x_t_BL == mask_id).flatten().nonzero()[:, 0]
    return x_BL.flatten()[positions_N.to(x_BL.device)]


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
