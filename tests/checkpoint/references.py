"""Small reference networks with no zero weights, and checkpoints of them as the reference trainers write them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imdm_scale.checkpoint.reference_dit import DitShape, ReferenceDit

SIZES = {"vocab_size": 31, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "cond_size": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "mdlm": {},
    "qk_norm": {"qk_norm": True},
    "softcap": {"softcap": 2.0},
    "imdm": {"noise_dim": 6},
    "imdm_all": {"noise_dim": 5, "qk_norm": True, "softcap": 3.0, "num_layers": 3, "num_heads": 2},
    "masks": {"num_masks": 5},
    "one_mask": {"num_masks": 1},
}


def reference(**changes: Any) -> ReferenceDit:
    """A random network, adaLN included; as in the reference, the table of a single mask is zero."""
    network = ReferenceDit(DitShape(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad:
                parameter.copy_(
                    1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
                )
            else:
                parameter.zero_()
    return network.eval()


def module_state(network: ReferenceDit) -> dict[str, Tensor]:
    """The state dict of the training module around a network."""
    return {f"backbone.{name}": tensor.detach().clone() for name, tensor in network.state_dict().items()}


def averages(network: ReferenceDit) -> list[Tensor]:
    """Averaged parameters, which differ from the present ones."""
    return [1.1 * parameter.detach() for parameter in network.parameters() if parameter.requires_grad]


def lightning(path: Path, network: ReferenceDit, config: dict[str, Any] | None = None, **more: Any) -> Path:
    """A checkpoint of Lightning whose hyper-parameters are of classes that cannot be imported when it is read."""
    package = ModuleType("gone")

    class Node:
        def __init__(self, value: Any) -> None:
            if isinstance(value, dict):
                self.__dict__["_content"] = {name: type(self)(item) for name, item in value.items()}
            else:
                self.__dict__["_val"] = value
            self.__dict__["_metadata"] = Kind

    class Kind:
        pass

    for kind in (Node, Kind):
        kind.__module__, kind.__qualname__ = "gone", kind.__name__
        setattr(package, kind.__name__, kind)
    sys.modules["gone"] = package
    try:
        content = {
            "epoch": 1,
            "global_step": 1000,
            "pytorch-lightning_version": "2.2.1",
            "state_dict": module_state(network),
            "hyper_parameters": {"config": Node(config or {}), "tokenizer": Kind()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "ema": {"decay": 0.9999, "num_updates": 9, "shadow_params": averages(network)},
        }
        torch.save(content | more, path)
    finally:
        del sys.modules["gone"]
    return path
