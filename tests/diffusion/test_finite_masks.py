"""Finitely many masks, told apart by the noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion.finite_masks import mask_index
from imdm_scale.diffusion.noise import mask_noise


@pytest.mark.parametrize(("kind", "scale"), [("uniform", 1.0), ("uniform", 3.0), ("normal", 0.5)])
@pytest.mark.parametrize("num_masks", [2, 7, 100])
def test_all_masks_are_equally_likely(kind, scale, num_masks):
    """Chi-square at 1e-4: one false alarm in 10,000 for each case, and the draws are always the same."""
    noise = mask_noise(3, torch.arange(500), 0, 40, 1, kind=kind, scale=scale)
    counts = torch.bincount(mask_index(noise, num_masks, kind, scale).flatten(), minlength=num_masks)
    assert len(counts) == num_masks
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@given(st.integers(1, 2**24), st.floats(-1, 1, width=32))
def test_every_noise_names_a_mask(num_masks, e):
    index = mask_index(torch.tensor([[e]]), num_masks)
    assert 0 <= index.item() < num_masks


def test_other_dimensions_are_not_read():
    noise = mask_noise(1, torch.arange(3), 0, 7, 5)
    other = noise.clone()
    other[..., 1:] = torch.nan
    assert torch.equal(mask_index(other, 9), mask_index(noise, 9))
