"""Fourier features of the two coordinates in which noise coupling hides token and time.

A network reads u and tau badly as they are: which token u stands for changes within a small part of its range.
Sines and cosines of high frequency tell near values apart (Tancik et al., "Fourier features let networks learn
high frequency functions in low dimensional domains", arXiv 2006.10739).

Shapes: K frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .coupling import coordinates

FEATURES_PER_FREQUENCY = 4
"""A sine and a cosine of each of the two coordinates."""


def fourier_features(
    noise: Tensor, num_frequencies: int, kind: str = "uniform", scale: float = 1.0
) -> Tensor:
    """sin(2 pi k u), cos(2 pi k u), sin(2 pi k tau), cos(2 pi k tau), each for k = 1, ..., K.

    The whole turns of k u are dropped in float64, where they are exact, so that a high frequency is as accurate
    as the first.

    Args:
        noise: float32 (..., D), D at least 2; features are taken before any cast to a narrower type.
        num_frequencies: K.
        kind, scale: the noise's law.

    Returns:
        float32 (..., 4 K): all sines of u, all its cosines, all sines of tau, all its cosines.

    Raises:
        ValueError: as `coupling.coordinates`.
    """
    k = torch.arange(1, num_frequencies + 1, dtype=torch.float64, device=noise.device)
    features = []
    for coordinate in coordinates(noise, kind, scale):
        angle = 2.0 * math.pi * (coordinate[..., None] * k).frac().float()
        features += [angle.sin(), angle.cos()]
    return torch.cat(features, dim=-1)
