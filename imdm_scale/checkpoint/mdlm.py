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

import torch
import torch.nn.functional as F
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError

SINUSOIDS = 256
"""Features of sigma: cosines in the first half (1 at sigma = 0), sines in the second (0)."""


def fold_mdlm(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    mask_token_id: int | None = None,
    attention_softcap: float = 0.0,
    length: int = 1024,
) -> tuple[Architecture, dict[str, Tensor]]:
    """Fold an MDLM or IMDM backbone whose `time_conditioning` is off.

    Args:
        state_dict: the backbone's tensors, with or without the prefix `backbone.`. An IMDM's mask embedding
            and q/k LayerNorms are taken where they are present.
        num_heads: None takes it from the rotary buffer's length.
        mask_token_id: None takes the last id, which MDLM appends to vocabularies without a mask token.
        attention_softcap: c of the bounded attention scores, 0 for none; the tensors do not tell.
        length: tokens of a block; the tensors do not tell.

    Returns:
        The architecture, with noise law `uniform` of scale 1 and no dropout (the tensors do not tell: change
        them with `dataclasses.replace`), and the tensors under `ImdmForMaskedLM`'s names, computed in float64
        and returned in float32.

    Raises:
        UserError: a tensor is missing or unknown, the heads do not fit, or the rotary base is not 10000.
    """
    prefixed = state_dict and all(name.startswith("backbone.") for name in state_dict)
    source = {
        name.removeprefix("backbone.") if prefixed else name: t.double() for name, t in state_dict.items()
    }
    inverse_frequency = source.pop("rotary_emb.inv_freq", None)

    def take(name: str) -> Tensor:
        if name not in source:
            raise UserError(
                f"The checkpoint has no tensor {name}; give the state dict of an MDLM or IMDM backbone (DIT)."
            )
        return source.pop(name)

    c = condition_at_sigma_zero(take)
    folded = {"token_embedding.weight": take("vocab_embed.embedding")}
    vocab_size, hidden_size = folded["token_embedding.weight"].shape
    noise_dim = 0
    if "vocab_embed.imdm_mlp.0.weight" in source:
        folded["mask_embedding.dense_in.weight"] = take("vocab_embed.imdm_mlp.0.weight")
        folded["mask_embedding.dense_in.bias"] = take("vocab_embed.imdm_mlp.0.bias")
        folded["mask_embedding.dense_out.weight"] = take("vocab_embed.imdm_mlp.2.weight")
        noise_dim = folded["mask_embedding.dense_in.weight"].shape[1]

    num_layers = 0
    qk_norm = "blocks.0.q_norm.weight" in source
    while num_layers == 0 or f"blocks.{num_layers}.norm1.weight" in source:
        block = f"blocks.{num_layers}."
        adaln = take(block + "adaLN_modulation.weight") @ c + take(block + "adaLN_modulation.bias")
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln.chunk(6)
        folded[block + "norm1.weight"] = take(block + "norm1.weight") * (1 + scale1)
        folded[block + "norm1.bias"] = shift1
        folded[block + "attention.qkv.weight"] = take(block + "attn_qkv.weight")
        if qk_norm:
            for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
                folded[block + "attention." + name] = take(block + name)
        folded[block + "attention.out.weight"] = gate1[:, None] * take(block + "attn_out.weight")
        folded[block + "norm2.weight"] = take(block + "norm2.weight") * (1 + scale2)
        folded[block + "norm2.bias"] = shift2
        folded[block + "mlp.dense_in.weight"] = take(block + "mlp.0.weight")
        folded[block + "mlp.dense_in.bias"] = take(block + "mlp.0.bias")
        folded[block + "mlp.dense_out.weight"] = gate2[:, None] * take(block + "mlp.2.weight")
        folded[block + "mlp.dense_out.bias"] = gate2 * take(block + "mlp.2.bias")
        num_layers += 1

    adaln = take("output_layer.adaLN_modulation.weight") @ c + take("output_layer.adaLN_modulation.bias")
    shift, scale = adaln.chunk(2)
    folded["final_norm.weight"] = take("output_layer.norm_final.weight") * (1 + scale)
    folded["final_norm.bias"] = shift
    folded["head.weight"] = take("output_layer.linear.weight")
    folded["head.bias"] = take("output_layer.linear.bias")
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
        qk_norm=qk_norm,
        attention_softcap=attention_softcap,
    )
    return architecture, {name: tensor.float().contiguous() for name, tensor in folded.items()}


def condition_at_sigma_zero(take: Callable[[str], Tensor]) -> Tensor:
    """The constant c, (cond_dim,), that every adaLN layer sees when sigma = 0 (MDLM, models/dit.py)."""
    first_weight = take("sigma_map.mlp.0.weight")
    half = torch.ones(SINUSOIDS // 2, dtype=first_weight.dtype)
    sinusoids = torch.cat((half, 0 * half))
    hidden = F.silu(first_weight @ sinusoids + take("sigma_map.mlp.0.bias"))
    return F.silu(take("sigma_map.mlp.2.weight") @ hidden + take("sigma_map.mlp.2.bias"))


def heads(num_heads: int | None, hidden_size: int, inverse_frequency: Tensor | None) -> int:
    """Number of heads, from the setting or from the rotary buffer (head_dim / 2,); the two must agree."""
    if inverse_frequency is None:
        if num_heads is None:
            raise UserError(
                "The checkpoint has no rotary_emb.inv_freq to tell the number of heads; set num_heads."
            )
        if hidden_size % (2 * num_heads):
            raise UserError(
                f"num_heads is {num_heads}, which does not divide the width {hidden_size} into even parts."
            )
        return num_heads
    head_dim = 2 * len(inverse_frequency)
    if hidden_size % head_dim or num_heads not in (None, hidden_size // head_dim):
        raise UserError(
            f"num_heads is {num_heads}, but the checkpoint's rotary_emb.inv_freq says heads of width "
            f"{head_dim} in a network of width {hidden_size}; leave num_heads out."
        )
    expected = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if not torch.allclose(
        inverse_frequency, expected, rtol=1e-2, atol=0.0
    ):  # it may have been stored in bfloat16
        raise UserError(
            "The checkpoint's rotary_emb.inv_freq has not the base 10000 of MDLM; it cannot be imported."
        )
    return hidden_size // head_dim
