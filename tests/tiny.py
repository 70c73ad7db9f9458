"""A network small enough to train in a test, without a zero weight, so that every part shows in its logits.

Shapes: B batch, L positions, D noise dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.hf.export import config_from_architecture
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

SHAPE = {
    "vocab_size": 97,  # odd and prime: every tensor-parallel size pads it
    "mask_token_id": 96,
    "length": 16,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "noise_dim": 6,
}


def tiny(**changes: Any) -> Architecture:
    """The network's shape, with some fields changed."""
    return Architecture(**{**SHAPE, **changes})


def plain_network(architecture: Architecture) -> ImdmForMaskedLM:
    """The plain torch network with random weights."""
    network = ImdmForMaskedLM(config_from_architecture(architecture))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return network


def weights_of(network: torch.nn.Module) -> dict[str, Tensor]:
    """Canonical name -> a copy of the weight."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def random_input(architecture: Architecture, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), about half of them masked, and noise (B, L, D)."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, architecture.length)
    ids_BL = torch.randint(0, architecture.mask_token_id, shape, generator=generator)
    masked_BL = torch.rand(shape, generator=generator) < 0.5
    noise_BLD = 2 * torch.rand(*shape, architecture.noise_dim, generator=generator) - 1
    return ids_BL.masked_fill(masked_BL, architecture.mask_token_id), noise_BLD


def source(weights: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """The weights as what `build_module` asks for."""
    return lambda name: weights[name]
