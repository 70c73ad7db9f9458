"""Small folders of LLaDA with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imdm_scale.errors import UserError

CONFIG: dict[str, Any] = {
    # The fields of GSAI-ML/LLaDA-8B-Base, with its sizes made small.
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 64,
    "eos_token_id": 3,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 50,
    "max_sequence_length": 24,
    "mlp_hidden_size": 56,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 3,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 60,
    "weight_tying": False,
}


def random_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """LLaDA's tensors by its names, none of them zero or one."""
    generator = torch.Generator().manual_seed(0)
    width, inner, rows = CONFIG["d_model"], CONFIG["mlp_hidden_size"], CONFIG["embedding_size"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (rows, width), "ln_f": (width,), "ff_out": (rows, width)}
    for i in range(CONFIG["n_layers"]):
        of_block = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (width, width))
        of_block |= {"attn_norm": (width,), "ff_norm": (width,)}
        of_block |= {"ff_proj": (inner, width), "up_proj": (inner, width), "ff_out": (width, inner)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in of_block.items()}
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        value = 1 + 0.2 * noise if len(shape) == 1 else 0.2 * noise
        tensors[f"model.transformer.{name}.weight"] = value.to(dtype)
    return tensors


def describe(folder: Path, **changes: Any) -> None:
    fields = {name: value for name, value in {**CONFIG, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(fields))


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)
