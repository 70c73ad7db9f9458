"""An exported model as a state dict of the reference networks (MDLM's and IMDM's DIT), which compute the same.

Their adaLN becomes constant: its weight is zero and its bias says shift = the norm's bias, scale = 0 and gate = 1, with
the norm's own weight in its place. So folding gives the same tensors back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from imdm_scale.checkpoint.mdlm import PREFIX
from imdm_scale.checkpoint.reference_dit import NUM_SINUSOIDS, DitShape, rotary_frequencies
from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError

COND_SIZE = 128
"""Width of the condition in all the reference's configurations."""
EXPRESSIBLE = {
    "vocab_size",
    "mask_token_id",
    "length",
    "hidden_size",
    "num_layers",
    "num_heads",
    "noise_dim",
    "noise_kind",
    "noise_scale",
    "num_masks",
    "dropout",
    "qk_norm",
    "attention_softcap",
    "initializer_range",
}
"""What the reference networks can be told, too; everything else must be as it is by default."""


def check_expressible(architecture: Architecture, vocabulary_order: str) -> None:
    """Refuses a network that the reference code cannot build.

    Raises:
        UserError: the first setting that it does not have.
    """
    for setting in fields(Architecture):
        value, theirs = getattr(architecture, setting.name), setting.default
        if setting.name == "mlp_size":
            theirs = 4 * architecture.hidden_size
        if setting.name not in EXPRESSIBLE and value != theirs:
            raise UserError(
                f"{setting.name} is {value!r} in this model, but the reference networks only have {theirs!r}; "
                "this model cannot be written for them."
            )
    if vocabulary_order != "identity":
        raise UserError(
            f"vocabulary_order is {vocabulary_order!r} in this model, but the reference code only draws in the order "
            "of ids; this model cannot be written for it."
        )


def dit_shape(architecture: Architecture) -> DitShape:
    """The reference network of an architecture that `check_expressible` lets pass."""
    return DitShape(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        num_layers=architecture.num_layers,
        num_heads=architecture.num_heads,
        cond_size=COND_SIZE,
        noise_dim=0 if architecture.num_masks else architecture.noise_dim,
        num_masks=architecture.num_masks,
        qk_norm=architecture.qk_norm,
        softcap=architecture.attention_softcap,
    )


def reference_tensors(
    architecture: Architecture, weight: Callable[[str], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Name in the reference's training module (`backbone. ...`) -> how to make the tensor, in the reference's order.

    Args:
        weight: name in `ImdmForMaskedLM` -> whole tensor; the results have its type, but for the float32 rotary
            buffer.
    """
    h = architecture.hidden_size
    dtype = weight("final_norm.bias").dtype
    made: dict[str, Callable[[], Tensor]] = {}

    def put(name: str, ours: str) -> None:
        made[PREFIX + name] = lambda: weight(ours)

    def put_zeros(name: str, *shape: int) -> None:
        made[PREFIX + name] = lambda: torch.zeros(shape, dtype=dtype)

    def put_adaln(layer: str, *parts: str | float) -> None:
        """A constant adaLN: each part is the name of a tensor or a number that fills one."""
        put_zeros(layer + "adaLN_modulation.weight", len(parts) * h, COND_SIZE)
        made[PREFIX + layer + "adaLN_modulation.bias"] = lambda: torch.cat(
            [weight(part) if isinstance(part, str) else torch.full((h,), part, dtype=dtype) for part in parts]
        )

    put("vocab_embed.embedding", "token_embedding.weight")
    if architecture.num_masks:
        put("vocab_embed.imdm_mlp.weight", "mask_embedding.table.weight")
    elif architecture.noise_dim:
        put("vocab_embed.imdm_mlp.0.weight", "mask_embedding.dense_in.weight")
        put("vocab_embed.imdm_mlp.0.bias", "mask_embedding.dense_in.bias")
        put("vocab_embed.imdm_mlp.2.weight", "mask_embedding.dense_out.weight")
    for layer, width in (("0", NUM_SINUSOIDS), ("2", COND_SIZE)):
        put_zeros(f"sigma_map.mlp.{layer}.weight", COND_SIZE, width)
        put_zeros(f"sigma_map.mlp.{layer}.bias", COND_SIZE)
    made[PREFIX + "rotary_emb.inv_freq"] = lambda: rotary_frequencies(architecture.head_dim)
    for i in range(architecture.num_layers):
        block = f"blocks.{i}."
        if architecture.qk_norm:
            for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
                put(block + name, block + "attention." + name)
        put(block + "norm1.weight", block + "norm1.weight")
        put(block + "attn_qkv.weight", block + "attention.qkv.weight")
        put(block + "attn_out.weight", block + "attention.out.weight")
        put(block + "norm2.weight", block + "norm2.weight")
        for theirs, ours in (("mlp.0", "mlp.dense_in"), ("mlp.2", "mlp.dense_out")):
            for part in (".weight", ".bias"):
                put(block + theirs + part, block + ours + part)
        put_adaln(block, block + "norm1.bias", 0.0, 1.0, block + "norm2.bias", 0.0, 1.0)
    put("output_layer.norm_final.weight", "final_norm.weight")
    put("output_layer.linear.weight", "head.weight")
    put("output_layer.linear.bias", "head.bias")
    put_adaln("output_layer.", "final_norm.bias", 0.0)
    return made
