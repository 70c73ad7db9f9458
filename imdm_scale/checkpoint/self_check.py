"""Does a converted model compute what its source computes?

Shapes: B batch, L length, D noise dimensions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from imdm_scale.checkpoint.reference_dit import ReferenceDit
from imdm_scale.diffusion.finite_masks import mask_index
from imdm_scale.errors import UserError
from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative error of logits by the type that the weights were rounded to.

float32: the two networks add up in other orders and their folded weights are rounded once; both errors are of some
1e-6 and grow with depth. bfloat16: each weight is off by up to 2^-9 = 0.2 %, independently, so a sum of many products
is off by about as much, and the logits by that times the root of the number of layers: 1 to 2 %. A wrong tensor shows
as an error of order 1."""
BATCH, LENGTH = 2, 64


@torch.no_grad()
def largest_error(model: ImdmForMaskedLM, reference: ReferenceDit) -> float:
    """The largest difference of the two networks' logits, relative to the largest logit, in float32 arithmetic.

    The input is random token ids, a quarter of them masked, and random noise, the same in every call.
    """
    config = model.config
    ids_BL, noise_BLD = _random_input(config)
    masked_BL = ids_BL == config.mask_token_id
    noise = noise_BLD
    if config.num_masks:
        noise = mask_index(noise_BLD, config.num_masks, config.noise_kind, config.noise_scale)
    expected_BLV = reference(ids_BL, masked_BL, noise)
    found_BLV = model.float()(ids_BL, mask_noise=noise_BLD).logits
    error, largest = (found_BLV - expected_BLV).abs().max().item(), expected_BLV.abs().max().item()
    return error / largest if error else 0.0


def _random_input(config: ImdmConfig) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), a quarter of them masked, and noise (B, L, D)."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, min(LENGTH, config.length))
    ids_BL = torch.randint(config.vocab_size, shape, generator=generator)
    masked_BL = torch.rand(shape, generator=generator) < 0.25
    noise_BLD = config.noise_scale * (2 * torch.rand(*shape, config.noise_dim, generator=generator) - 1)
    return ids_BL.masked_fill(masked_BL, config.mask_token_id), noise_BLD


def check(model: ImdmForMaskedLM, reference: ReferenceDit, bound: float, written: Path) -> float:
    """`largest_error`, if it is small enough.

    Args:
        bound: what is.
        written: what was made, for the message.

    Raises:
        UserError: it is not.
    """
    error = largest_error(model, reference)
    if not error <= bound:  # also where it is no number
        raise UserError(
            f"{written} was written, but its logits differ from the source's by {error:.1e} of the largest, more than "
            f"{bound:.0e}; do not use it, and report this with the kind of checkpoint."
        )
    return error


@torch.no_grad()
def same_logits(model: ImdmForMaskedLM, source: ImdmForMaskedLM, written: Path) -> str:
    """In words, that two networks of the same kind and type give the same logits, bit for bit, in float32 arithmetic.

    Args:
        written: what was made, for the message.

    Raises:
        UserError: they do not.
    """
    ids_BL, noise_BLD = _random_input(model.config)
    found_BLV = model.float()(ids_BL, mask_noise=noise_BLD).logits
    error = (found_BLV - source.float()(ids_BL, mask_noise=noise_BLD).logits).abs().max().item()
    if error != 0.0:
        raise UserError(
            f"{written} was written, but its logits differ from the source's by {error:.1e}, where no bit should; do "
            "not use it, and report this."
        )
    return "checked: logits are the source's, bit for bit"
