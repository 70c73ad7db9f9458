"""The averaged weights of a Lightning checkpoint, which are stored without names.

`ema["shadow_params"]` lists the averages of `backbone.parameters()`, then `noise.parameters()`, those without a
gradient left out (kuleshov-group/mdlm and Ugness/IMDM, models/ema.py). Torch lists a module's own parameters first,
then its children's in the order of their making, which `ReferenceDit` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imdm_scale.checkpoint.reference_dit import DitShape, ReferenceDit
from imdm_scale.checkpoint.reference_file import ReferenceFile
from imdm_scale.errors import UserError


def averaged_tensors(file: ReferenceFile, shape: DitShape) -> dict[str, Tensor]:
    """The backbone's tensors with the averages in the places of the weights.

    Args:
        shape: the backbone's.

    Raises:
        UserError: the file has no averages, or they do not match the weights in number or shape.
    """
    if file.averaged is None:
        raise UserError(
            f"--ema is set, but {file.path} has no averaged weights (ema.shadow_params); leave --ema out to take the "
            "weights as they are."
        )
    with torch.device("meta"):
        parameters = dict(ReferenceDit(shape).named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    # IMDM adds a frozen table when it continues another model's averages.
    if len(file.averaged) == len(parameters) + len(file.noise_shapes):
        names = list(parameters)
    of_noise = [tuple(tensor.shape) for tensor in file.averaged[len(names) :]]
    if len(file.averaged) < len(names) or (of_noise and of_noise != list(file.noise_shapes)):
        raise UserError(
            f"{file.path} has {len(file.averaged)} averaged tensors for {len(names)} parameters; it was averaged over "
            "another network, so leave --ema out."
        )
    averaged = dict(zip(names, file.averaged, strict=False))
    for name, tensor in averaged.items():
        if tensor.shape != file.tensors[name].shape:
            raise UserError(
                f"The averaged tensor of {file.path} in the place of {name} has the shape {tuple(tensor.shape)}, not "
                f"{tuple(file.tensors[name].shape)}; it was averaged over another network, so leave --ema out."
            )
    return file.tensors | averaged
