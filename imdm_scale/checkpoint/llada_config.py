"""LLaDA's config.json and this project's architecture.

The fields, and what they are where the file is silent, are those of configuration_llada.py in GSAI-ML/LLaDA-8B-Base
(arXiv 2502.09992), which has them from OLMo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError

CONFIG_FILE = "config.json"
NEEDED: dict[str, tuple[Any, Any, str]] = {
    "block_type": ("llama", "sequential", "only Llama's block is known here"),
    "block_group_size": (1, 1, "the weights of grouped blocks have other names"),
    "activation_type": ("silu", "swiglu", "the MLP is silu(gate) * value"),
    "layer_norm_type": ("rms", "default", "the norms are RMSNorms"),
    "layer_norm_with_affine": (True, True, "every norm has a weight"),
    "include_bias": (False, False, "attention has no biases here"),
    "include_qkv_bias": (False, False, "attention has no biases here"),
    "bias_for_layer_norm": (False, False, "RMSNorms have no bias here"),
    "rope": (True, False, "positions are told by the rotary embedding"),
    "alibi": (False, False, "positions are told by the rotary embedding"),
    "attention_layer_norm": (False, False, "a norm over all queries or keys together is not known here"),
    "multi_query_attention": (False, False, "every head has its own keys and values here"),
    "input_emb_norm": (False, False, "embeddings are not scaled here"),
    "scale_logits": (False, False, "logits are not scaled here"),
    "weight_tying": (False, True, "embedding and head are two tensors here"),
}
"""Field -> the only value that can be imported, its value where the file has none, and why."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json.

    Raises:
        UserError: there is none, or it is not LLaDA's.
    """
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or fields.get("model_type") != "llada":
            raise ValueError("its model_type is not 'llada'")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not the configuration of a LLaDA model ({error}); give a folder like GSAI-ML/LLaDA-8B-Base."
        ) from None
    return fields


def architecture_of_llada(fields: Mapping[str, Any], path: Path) -> Architecture:
    """The network that LLaDA's configuration describes, without mask noise and without dropout.

    The vocabulary has the rows of the embedding, padding included, so that nothing is lost.

    Args:
        fields: of config.json.
        path: where they come from, for messages.

    Raises:
        UserError: a field says what these networks cannot do, is missing or makes no sense.
    """
    for name, (needed, default, why) in NEEDED.items():
        seen = fields.get(name, default)
        if (default if seen is None else seen) != needed:
            raise UserError(
                f"{name} is {json.dumps(seen)} in {path}, but {why}; only LLaDA models with {name} "
                f"{json.dumps(needed)} can be imported, as LLaDA-8B is."
            )

    def whole(name: str, default: int | None = None) -> int:
        seen = default if fields.get(name) is None else fields[name]
        if (
            isinstance(seen, bool)
            or not isinstance(seen, int)
            or seen < (0 if name == "mask_token_id" else 1)
        ):
            raise UserError(
                f"{name} is {json.dumps(seen)} in {path}, but must be a positive whole number; correct the file."
            )
        return seen

    def number(name: str, default: float) -> float:
        seen = default if fields.get(name) is None else fields[name]
        if isinstance(seen, bool) or not isinstance(seen, int | float) or not seen > 0:
            raise UserError(f"{name} is {json.dumps(seen)} in {path}, but must be above 0; correct the file.")
        return float(seen)

    width, heads = whole("d_model"), whole("n_heads")
    if (grouped := whole("n_kv_heads", heads)) != heads:
        raise UserError(
            f"n_kv_heads is {grouped} in {path}, but n_heads is {heads}, and grouped queries are not supported; only "
            "LLaDA models with as many of both can be imported, as LLaDA-8B is."
        )
    if width % (2 * heads):
        raise UserError(
            f"n_heads is {heads} in {path}, which does not divide d_model, {width}, into even parts; correct the file."
        )
    rows = whole("embedding_size", whole("vocab_size"))
    if (mask := whole("mask_token_id")) >= rows:
        raise UserError(
            f"mask_token_id is {mask} in {path}, but the embedding has {rows} rows; correct the file."
        )
    return Architecture(
        vocab_size=rows,
        mask_token_id=mask,
        length=whole("max_sequence_length", 1024),
        hidden_size=width,
        num_layers=whole("n_layers"),
        num_heads=heads,
        noise_dim=0,
        rope_base=number("rope_theta", 10000.0),
        norm="rmsnorm",
        layer_norm_eps=number("rms_norm_eps", 1e-5),
        mlp="swiglu",
        mlp_size=whole("mlp_hidden_size", whole("mlp_ratio", 4) * width),
        bias=False,
    )


def llada_of_architecture(architecture: Architecture) -> dict[str, Any]:
    """The fields of config.json that describe a network.

    Raises:
        UserError: LLaDA's network cannot be what this one is.
    """
    plain = {
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "bias": False,
        "qk_norm": False,
        "attention_softcap": 0.0,
        "noise_dim": 0,
    }
    for name, needed in plain.items():
        if (seen := getattr(architecture, name)) != needed:
            raise UserError(
                f"The model's {name} is {json.dumps(seen)}, but a LLaDA network can only have {json.dumps(needed)}; "
                "keep the model as the exported folder that it is."
            )
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        **{name: needed for name, (needed, _, _) in NEEDED.items()},
        "multi_query_attention": None,
        "d_model": architecture.hidden_size,
        "n_layers": architecture.num_layers,
        "n_heads": architecture.num_heads,
        "n_kv_heads": architecture.num_heads,
        "mlp_hidden_size": architecture.mlp_size,
        "max_sequence_length": architecture.length,
        "rope_theta": architecture.rope_base,
        "rope_full_precision": True,
        "rms_norm_eps": architecture.layer_norm_eps,
        "vocab_size": architecture.vocab_size,
        "embedding_size": architecture.vocab_size,
        "mask_token_id": architecture.mask_token_id,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    }
