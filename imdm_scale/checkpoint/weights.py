"""Where a network's first weights come from, tensor by tensor: initial values or an exported model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from imdm_scale.checkpoint.stored_model import open_model
from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError
from imdm_scale.model.weights import canonical_shapes, initial_weight

Source = Callable[[str], Tensor]
"""Canonical name -> whole tensor."""


def fresh_weights(architecture: Architecture, seed: int) -> Source:
    """The initial values of a network."""
    shapes = canonical_shapes(architecture)
    return lambda name: initial_weight(name, shapes[name], architecture, seed)


def folder_weights(folder: Path, architecture: Architecture, seed: int) -> Source:
    """The weights of an exported model or of a checkpoint, read when asked for.

    A mask embedding that the file lacks gets its initial value, with which the network computes what it
    computed before: so a plain masked diffusion model becomes an infinite mask one.

    Raises:
        UserError: the file cannot be read, or its tensors do not fit the architecture.
    """
    shapes = canonical_shapes(architecture)
    fresh = fresh_weights(architecture, seed)
    model = open_model(folder)
    found = model.shapes
    for name, shape in shapes.items():
        if name not in found and name.startswith("mask_embedding."):
            continue
        if found.get(name) != shape:
            seen = f"has the shape {found[name]}" if name in found else "is missing"
            raise UserError(
                f"{name} {seen} in the weights of {folder}, but the configured network needs {shape}; set model.* "
                "to the folder's config.json or give another folder."
            )

    return lambda name: model.tensor(name) if name in found else fresh(name)
