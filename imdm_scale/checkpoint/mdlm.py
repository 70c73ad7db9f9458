"""Import of MDLM's and IMDM's published checkpoints, whose time-independent adaLN folds away.

Both networks condition every block on c = SiLU(W2 SiLU(W1 s + b1) + b2), s the sinusoids of the noise level
sigma. With their `time_conditioning` off sigma is always 0, so c is a constant, and so are adaLN's shift,
scale and gate. Since
    LN(x) w (1 + scale) + shift   is a LayerNorm of weight w (1 + scale) and bias shift, and
    gate * (W y + b)              is a linear layer of weight diag(gate) W and bias gate * b,
the network equals, without any loss, the pre-norm transformer of `imdm_scale.hf`.
Key names: kuleshov-group/mdlm and Ugness/IMDM, models/dit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError

PREFIX = "backbone."
"""Of a backbone's tensors in the checkpoint of a whole training module."""
SINUSOIDS = 256
"""Features of sigma: cosines in the first half (1 at sigma = 0), sines in the second (0)."""


@dataclass(frozen=True)
class FoldedNetwork:
    """A plain network, each weight of which is computed from the checkpoint when it is asked for."""

    architecture: Architecture
    makers: dict[str, Callable[[], Tensor]]
    """`ImdmForMaskedLM`'s name -> how to make the tensor, in float64."""

    def weight(self, name: str) -> Tensor:
        """One whole weight in float32; KeyError if there is none of that name."""
        return self.makers[name]().float().contiguous()


def fold_mdlm(state_dict: Mapping[str, Tensor], **settings: Any) -> tuple[Architecture, dict[str, Tensor]]:
    """`folded_network` with all its weights computed."""
    network = folded_network(state_dict, **settings)
    return network.architecture, {name: network.weight(name) for name in network.makers}


def folded_network(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    mask_token_id: int | None = None,
    attention_softcap: float = 0.0,
    length: int = 1024,
) -> FoldedNetwork:
    """Fold an MDLM or IMDM backbone whose `time_conditioning` is off.

    Args:
        state_dict: the backbone's tensors, with or without the prefix `backbone.`. An IMDM's mask embedding (a
            perceptron, or a table of finitely many masks) and q/k LayerNorms are taken where they are present.
        num_heads: None takes it from the rotary buffer's length.
        mask_token_id: None takes the last id, which MDLM appends to vocabularies without a mask token.
        attention_softcap: c of the bounded attention scores, 0 for none; the tensors do not tell.
        length: tokens of a block; the tensors do not tell.

    Returns:
        The architecture, with noise law `uniform` of scale 1 and no dropout (the tensors do not tell: change
        them with `dataclasses.replace`), and the weights, computed in float64 one by one.

    Raises:
        UserError: a tensor is missing or unknown, the heads do not fit, or the rotary base is not 10000.
    """
    source = dict(without_prefix(state_dict))
    inverse_frequency = source.pop("rotary_emb.inv_freq", None)

    def take(name: str) -> Tensor:
        if name not in source:
            raise UserError(
                f"The checkpoint has no tensor {name}; give the state dict of an MDLM or IMDM backbone (DIT)."
            )
        return source.pop(name)

    makers: dict[str, Callable[[], Tensor]] = {}

    def keep(name: str, tensor: Tensor) -> None:
        makers[name] = lambda: tensor.double()

    def scale(name: str, factor: Tensor, tensor: Tensor) -> None:
        makers[name] = lambda: factor * tensor.double()

    c = condition_at_sigma_zero(take)
    embedding = take("vocab_embed.embedding")
    keep("token_embedding.weight", embedding)
    vocab_size, hidden_size = embedding.shape
    noise_dim = num_masks = 0
    if "vocab_embed.imdm_mlp.0.weight" in source:
        first = take("vocab_embed.imdm_mlp.0.weight")
        noise_dim = first.shape[1]
        keep("mask_embedding.dense_in.weight", first)
        keep("mask_embedding.dense_in.bias", take("vocab_embed.imdm_mlp.0.bias"))
        keep("mask_embedding.dense_out.weight", take("vocab_embed.imdm_mlp.2.weight"))
    elif "vocab_embed.imdm_mlp.weight" in source:
        table = take("vocab_embed.imdm_mlp.weight")
        noise_dim, num_masks = 1, len(table)
        keep("mask_embedding.table.weight", table)

    num_layers = 0
    qk_norm = "blocks.0.q_norm.weight" in source
    while num_layers == 0 or f"blocks.{num_layers}.norm1.weight" in source:
        block = f"blocks.{num_layers}."
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln_constants(take, block, c).chunk(6)
        scale(block + "norm1.weight", 1 + scale1, take(block + "norm1.weight"))
        keep(block + "norm1.bias", shift1)
        keep(block + "attention.qkv.weight", take(block + "attn_qkv.weight"))
        if qk_norm:
            for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
                keep(block + "attention." + name, take(block + name))
        scale(block + "attention.out.weight", gate1[:, None], take(block + "attn_out.weight"))
        scale(block + "norm2.weight", 1 + scale2, take(block + "norm2.weight"))
        keep(block + "norm2.bias", shift2)
        keep(block + "mlp.dense_in.weight", take(block + "mlp.0.weight"))
        keep(block + "mlp.dense_in.bias", take(block + "mlp.0.bias"))
        scale(block + "mlp.dense_out.weight", gate2[:, None], take(block + "mlp.2.weight"))
        scale(block + "mlp.dense_out.bias", gate2, take(block + "mlp.2.bias"))
        num_layers += 1

    shift, final_scale = adaln_constants(take, "output_layer.", c).chunk(2)
    scale("final_norm.weight", 1 + final_scale, take("output_layer.norm_final.weight"))
    keep("final_norm.bias", shift)
    keep("head.weight", take("output_layer.linear.weight"))
    keep("head.bias", take("output_layer.linear.bias"))
    if source:
        raise UserError(
            f"The checkpoint has tensors that have no place in the network: {', '.join(sorted(source))}; "
            "only MDLM, and IMDM with uniform or normal mask noise of fixed law, can be imported."
        )
    architecture = Architecture(
        vocab_size=vocab_size,
        mask_token_id=vocab_size - 1 if mask_token_id is None else mask_token_id,
        length=length,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=heads(num_heads, hidden_size, inverse_frequency),
        noise_dim=noise_dim,
        num_masks=num_masks,
        qk_norm=qk_norm,
        attention_softcap=attention_softcap,
    )
    return FoldedNetwork(architecture, makers)


def without_prefix(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without the prefix `backbone.`, if all have it."""
    if all(name.startswith(PREFIX) for name in state_dict):
        return {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
    return state_dict


def adaln_constants(take: Callable[[str], Tensor], layer: str, c: Tensor) -> Tensor:
    """What an adaLN layer gives for the constant condition c, float64.

    Where its weight is zero this is its bias, bit for bit: a sum with the zeros would lose the sign of -0.
    """
    weight, bias = take(layer + "adaLN_modulation.weight"), take(layer + "adaLN_modulation.bias").double()
    return weight.double() @ c + bias if weight.any() else bias


def condition_at_sigma_zero(take: Callable[[str], Tensor]) -> Tensor:
    """The constant c, (cond_dim,), that every adaLN layer sees when sigma = 0 (MDLM, models/dit.py)."""
    first_weight = take("sigma_map.mlp.0.weight").double()
    half = torch.ones(SINUSOIDS // 2, dtype=first_weight.dtype)
    sinusoids = torch.cat((half, 0 * half))
    hidden = F.silu(first_weight @ sinusoids + take("sigma_map.mlp.0.bias").double())
    return F.silu(take("sigma_map.mlp.2.weight").double() @ hidden + take("sigma_map.mlp.2.bias").double())


def heads(num_heads: int | None, hidden_size: int, inverse_frequency: Tensor | None) -> int:
    """Number of heads, from the setting or from the rotary buffer (head_dim / 2,); the two must agree."""
    if inverse_frequency is None:
        if num_heads is None:
            raise UserError(
                "The checkpoint has no rotary_emb.inv_freq to tell the number of heads; give --num-heads."
            )
        if hidden_size % (2 * num_heads):
            raise UserError(
                f"--num-heads is {num_heads}, which does not divide the width {hidden_size} into even parts."
            )
        return num_heads
    head_dim = 2 * len(inverse_frequency)
    if hidden_size % head_dim or num_heads not in (None, hidden_size // head_dim):
        raise UserError(
            f"--num-heads is {num_heads}, but the checkpoint's rotary_emb.inv_freq says heads of width "
            f"{head_dim} in a network of width {hidden_size}; leave it out."
        )
    expected = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if not torch.allclose(
        inverse_frequency.double(), expected, rtol=1e-2, atol=0.0
    ):  # it may have been stored in bfloat16
        raise UserError(
            "The checkpoint's rotary_emb.inv_freq has not the base 10000 of MDLM; it cannot be imported."
        )
    return hidden_size // head_dim
