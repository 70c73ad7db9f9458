"""Small networks with no zero weights, so that every part of them shows in the logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

MASK = 30


def make_network(**changes: object) -> ImdmForMaskedLM:
    settings = {
        "vocab_size": 31,
        "mask_token_id": MASK,
        "length": 12,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "noise_dim": 6,
    } | changes
    model = ImdmForMaskedLM(ImdmConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model.eval()


@pytest.fixture
def network() -> Callable[..., ImdmForMaskedLM]:
    """Factory of a small random network in evaluation mode; keyword arguments change its configuration."""
    return make_network


@pytest.fixture
def ids_BL() -> torch.Tensor:
    """Token ids (3, 12), about half of them masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, MASK, (3, 12), generator=generator)
    return ids.masked_fill(torch.rand(3, 12, generator=generator) < 0.5, MASK)
