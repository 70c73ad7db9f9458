"""The noise schedule, and the times at which a batch is trained.

Shapes: B batch. Times are float64 in [0, 1]: 0 is clean text, 1 is (almost) all masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise import Purpose, uniform

EPS0 = 1e-3
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


def alpha(t: Tensor) -> Tensor:
    """Probability that a position is still unmasked at time t: 1 - (1 - EPS0) t (MDLM's log-linear schedule,
    arXiv 2406.07524). alpha(1) is EPS0, not 0.
    """
    return 1.0 - (1.0 - EPS0) * t


def nelbo_weight(t: Tensor) -> Tensor:
    """-alpha'(t) / (1 - alpha(t)) = 1/t, the weight of a masked position's cross-entropy in the NELBO."""
    return 1.0 / t


def stratified_times(
    seed: int,
    step: int,
    num_samples: int,
    *,
    first: int = 0,
    count: int | None = None,
    sampling_eps: float = 1e-3,
) -> Tensor:
    """Times of the slots `first` to `first + count` of a global batch of `num_samples`.

    The range is cut into `num_samples` strata and every slot gets one of them, with its own jitter inside it.
    Slot i takes the stratum of rank frac(i * golden ratio), all rotated by one draw per step. Neighbouring
    slots are thus far apart in time: of any run of m slots the widest gap between times (around the circle)
    is about 1.6/m, so every micro-batch, process and pipeline stage sees the whole range. Slots dealt
    with a stride up to 7 leave gaps of at most 4/m; worse are strides that are larger Fibonacci numbers (8,
    13, 21, ...), so deal contiguous runs. Each slot's time is uniform over the steps' rotations.

    Args:
        seed, step: name the draw.
        num_samples: samples of the global batch, over all processes and accumulation steps.
        first, count: the slots wanted; by default all.
        sampling_eps: the smallest time; times are uniform on [sampling_eps, 1).

    Returns:
        float64 (count,) on the CPU.

    Raises:
        ValueError: slots outside the batch.
    """
    count = num_samples - first if count is None else count
    if not 0 <= first <= first + count <= num_samples:
        raise ValueError(f"slots {first} to {first + count} lie outside a batch of {num_samples}")
    rank = (torch.arange(num_samples, dtype=torch.float64) * GOLDEN_RATIO).frac().argsort().argsort()
    turn = uniform(
        seed, torch.zeros(1, dtype=torch.int64), Purpose.ORDER, step, 1, dtype=torch.float64
    ).item()
    slots_B = torch.arange(first, first + count)
    stratum_B = (rank[slots_B] + int(turn * num_samples)) % num_samples
    jitter_B = uniform(seed, slots_B, Purpose.TIME, step, 1, dtype=torch.float64)[:, 0, 0]
    return sampling_eps + (1.0 - sampling_eps) * (stratum_B + jitter_B) / num_samples
