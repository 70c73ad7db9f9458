"""Counter-based random numbers: every draw is a pure function of what it is for.

No generator state exists. A draw is named by (seed, sample id, purpose, step, position, dimension), so it
does not depend on how a batch is cut over processes, micro-batches or pipeline stages, and a resumed run
draws what the unbroken one would have drawn.

Shapes: B batch, L length (positions), D noise dimensions.
"""

from __future__ import annotations

import enum
import math
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Purpose(enum.IntEnum):
    """What a draw is for. The values enter the counters, so they never change."""

    TIME = 1
    """The time t of a training sample."""
    MASK = 2
    """Which positions the forward process masks."""
    MASK_NOISE = 3
    """The noise e of masked positions."""
    REVEAL = 4
    """Which masked positions a reverse step reveals, keeps or resets."""
    TOKEN = 5
    """Which token a revealed position becomes."""
    DROPOUT = 6
    """Which activations dropout removes."""
    ORDER = 7
    """The order in which samples are dealt or visited."""
    INIT = 8
    """Initial parameters."""
    SHARD_ORDER = 9
    """The order in which the shards of a corpus are visited."""
    MIXTURE = 10
    """Which corpus of a mixture a sample comes from."""
    VISIT = 12
    """Whether a training sample's state is one that a network visits."""
    VISIT_TOKEN = 13
    """Which token a position becomes on the way there."""
    TRAJECTORY = 14
    """Whether a training sample is labelled by a whole trajectory of the teacher."""
    PAIR_TIME = 15
    """The time of the state of a stored coupling."""
    SYNTHETIC_LAW = 20
    """The parameters of a synthetic task."""
    SYNTHETIC_SAMPLE = 21
    """A sample of a synthetic task."""


def philox4x32(
    counters: tuple[Word, Word, Word, Word], key: tuple[int, int]
) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123).

    Args:
        counters: four words in [0, 2^32): int64 tensors of broadcastable shapes, or Python integers.
        key: two words in [0, 2^32).

    Returns:
        Four words of the broadcast shape, int64 with values in [0, 2^32); the same bits on every device.
    """
    # A 32x32-bit product fills all 64 bits; int64 wraps around, and the masks below undo the sign.
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(ROUNDS):
        even = c0 * MULTIPLIERS[0]
        odd = c2 * MULTIPLIERS[1]
        c0 = ((odd >> 32) & WORD) ^ c1 ^ k0
        c2 = ((even >> 32) & WORD) ^ c3 ^ k1
        c1 = odd & WORD
        c3 = even & WORD
        k0 = (k0 + KEY_INCREMENTS[0]) & WORD
        k1 = (k1 + KEY_INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def uniform(
    seed: int,
    sample_ids_B: Tensor,
    purpose: Purpose,
    step: int,
    length: int,
    dims: int = 1,
    *,
    first_position: int = 0,
    first_dim: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers on [0, 1) for positions and dimensions of some samples.

    Any slice over samples, positions or dimensions equals the slice of the whole, bit for bit, on any device.

    Args:
        seed: the run's seed, in [0, 2^64).
        sample_ids_B: int64 names of the samples (not their places in a batch); fixes the device.
        purpose: what the draw is for.
        step: the training or sampling step, in [0, 2^64).
        length: number of positions L, from `first_position` on.
        dims: number of dimensions D, from `first_dim` on.
        dtype: float32 takes the top 24 bits of one word, float64 takes 53 bits of two words.

    Returns:
        (B, L, D) tensor of `dtype`.

    Raises:
        ValueError: seed or step out of range, or a dtype other than these two.
    """
    if not (0 <= seed < 2**64 and 0 <= step < 2**64):
        raise ValueError(f"seed and step must lie in [0, 2^64), not {seed} and {step}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
    key = philox4x32((int(purpose), step & WORD, step >> 32, 0), (seed & WORD, seed >> 32))[:2]

    device = sample_ids_B.device
    dims_per_block = 4 if dtype == torch.float32 else 2
    first_block = first_dim // dims_per_block
    end_block = -(-(first_dim + dims) // dims_per_block)
    block = torch.arange(first_block, end_block, device=device)
    position_L1 = torch.arange(first_position, first_position + length, device=device)[:, None]
    sample_B11 = sample_ids_B.to(torch.int64)[:, None, None]
    words = philox4x32((block, position_L1, sample_B11 & WORD, (sample_B11 >> 32) & WORD), key)

    if dtype == torch.float32:
        draws = [(word >> 8).to(dtype) * 2.0**-24 for word in words]
    else:
        pairs = ((words[0], words[1]), (words[2], words[3]))
        draws = [((high >> 5) * 2**26 + (low >> 6)).to(dtype) * 2.0**-53 for high, low in pairs]
    u_BLD = torch.stack(draws, dim=-1).flatten(-2)
    skipped = first_dim - first_block * dims_per_block
    return u_BLD[..., skipped : skipped + dims]


def mask_noise(
    seed: int,
    sample_ids_B: Tensor,
    step: int,
    length: int,
    noise_dim: int,
    *,
    kind: str = "uniform",
    scale: float = 1.0,
    first_position: int = 0,
) -> Tensor:
    """The noise e that a masked position carries (IMDM, arXiv 2605.10518: a masked state is (m, e)).

    Every position gets a value; the network reads it only where the token is the mask.

    Args:
        kind: "uniform" on [-scale, scale), or "normal" with standard deviation `scale`, by Box and Muller's
            transform in float64. Only "uniform" has the same bits on every device: logarithm and cosine may
            differ in the last bit of float64, and so now and then in the last bit of the result.
        first_position: position of the first column, as in `uniform`.

    Returns:
        float32 (B, L, D) with D = `noise_dim`, which may be 0.

    Raises:
        ValueError: `kind` is neither of the two.
    """
    purpose = Purpose.MASK_NOISE
    if kind == "uniform":
        u_BLD = uniform(seed, sample_ids_B, purpose, step, length, noise_dim, first_position=first_position)
        return (2.0 * u_BLD - 1.0) * scale
    if kind == "normal":
        u_BLE = uniform(
            seed,
            sample_ids_B,
            purpose,
            step,
            length,
            2 * noise_dim,
            first_position=first_position,
            dtype=torch.float64,
        )
        radius_BLD = torch.sqrt(-2.0 * torch.log1p(-u_BLE[..., 0::2]))
        return (scale * radius_BLD * torch.cos(2.0 * math.pi * u_BLE[..., 1::2])).to(torch.float32)
    raise ValueError(f"the noise's kind must be 'uniform' or 'normal', not {kind!r}")
