"""Fourier features of the noise's two coordinates."""

from __future__ import annotations

import math

import pytest
import torch

from imdm_scale.diffusion.coupling import coordinates
from imdm_scale.diffusion.fourier import FEATURES_PER_FREQUENCY, fourier_features
from imdm_scale.diffusion.noise import mask_noise


@pytest.mark.parametrize(("kind", "scale"), [("uniform", 1.0), ("uniform", 3.0), ("normal", 0.5)])
@pytest.mark.parametrize("num_frequencies", [1, 16, 500])
def test_values_and_their_order(kind, scale, num_frequencies):
    noise = mask_noise(1, torch.arange(3), 0, 7, 5, kind=kind, scale=scale)
    features = fourier_features(noise, num_frequencies, kind, scale)
    assert features.dtype == torch.float32
    assert features.shape == (3, 7, FEATURES_PER_FREQUENCY * num_frequencies)
    u, tau = coordinates(noise, kind, scale)
    for b, position in ((0, 0), (1, 6), (2, 3)):
        expected = [
            function(2 * math.pi * k * uniforms[b, position].item())
            for uniforms in (u, tau)
            for function in (math.sin, math.cos)
            for k in range(1, num_frequencies + 1)
        ]
        assert torch.allclose(features[b, position], torch.tensor(expected), rtol=0, atol=1e-6)


def test_other_dimensions_are_not_read():
    noise = mask_noise(1, torch.arange(3), 0, 7, 5)
    other = noise.clone()
    other[..., 2:] = torch.nan
    assert torch.equal(fourier_features(other, 4), fourier_features(noise, 4))


def test_too_little_noise_is_refused():
    with pytest.raises(ValueError, match="noise_dim must be at least 2"):
        fourier_features(torch.zeros(4, 1), 3)
