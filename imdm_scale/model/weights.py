"""Where every weight lives: whole tensors under their canonical names <-> one rank's shards.

The canonical names and layouts are those of the plain torch model (`imdm_scale.hf`), which are also those
of the exported files. H width, V vocabulary.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.model.placement import Placement

if TYPE_CHECKING:  # the names of weights are known without Megatron-core
    from imdm_scale.model.stage import ImdmStage

_LAYER_NAMES = {
    "input_layernorm.weight": ("norm1.weight", None),
    "input_layernorm.bias": ("norm1.bias", None),
    "self_attention.linear_qkv.weight": ("attention.qkv.weight", 0),
    "self_attention.q_layernorm.weight": ("attention.q_norm.weight", None),
    "self_attention.q_layernorm.bias": ("attention.q_norm.bias", None),
    "self_attention.k_layernorm.weight": ("attention.k_norm.weight", None),
    "self_attention.k_layernorm.bias": ("attention.k_norm.bias", None),
    "self_attention.linear_proj.weight": ("attention.out.weight", 1),
    "pre_mlp_layernorm.weight": ("norm2.weight", None),
    "pre_mlp_layernorm.bias": ("norm2.bias", None),
    "mlp.linear_fc1.weight": ("mlp.dense_in.weight", 0),
    "mlp.linear_fc1.bias": ("mlp.dense_in.bias", 0),
    "mlp.linear_fc2.weight": ("mlp.dense_out.weight", 1),
    "mlp.linear_fc2.bias": ("mlp.dense_out.bias", None),
}
_OTHER_NAMES = {
    "embedding.token_embedding.weight": ("token_embedding.weight", 0),
    "embedding.mask_embedding.dense_in.weight": ("mask_embedding.dense_in.weight", 0),
    "embedding.mask_embedding.dense_in.bias": ("mask_embedding.dense_in.bias", 0),
    "embedding.mask_embedding.dense_out.weight": ("mask_embedding.dense_out.weight", 1),
    "embedding.mask_embedding.dense_fourier.weight": ("mask_embedding.dense_fourier.weight", 0),
    "embedding.mask_embedding.table.weight": ("mask_embedding.table.weight", None),
    "decoder.final_layernorm.weight": ("final_norm.weight", None),
    "decoder.final_layernorm.bias": ("final_norm.bias", None),
    "head.weight": ("head.weight", 0),
    "head.bias": ("head.bias", 0),
}
PARTS = ("token_embedding", "mask_embedding", "attention", "mlp", "norm", "head")
"""The parts of a network of which gradients are reported."""
_INITIALLY_ZERO = (
    "head.weight",
    "mask_embedding.dense_out.weight",
    "mask_embedding.dense_fourier.weight",
    "mask_embedding.table.weight",
)
_SHARD_DIMS = dict([*_LAYER_NAMES.values(), *_OTHER_NAMES.values()])
"""The dimension that is cut, by canonical name without the number of the block."""
_VOCABULARY_TENSORS = ("token_embedding.weight", "head.weight", "head.bias")


def placements(stage: ImdmStage) -> Iterator[tuple[torch.nn.Parameter, Placement]]:
    """Every parameter of a stage with its placement, in a fixed order.

    Neither data nor shapes are read, which ZeRO-3 may have put elsewhere.
    """
    first_layer = stage.decoder.layers[0].layer_number - 1
    for local_name, parameter in stage.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", local_name)
        if match:
            name = f"blocks.{first_layer + int(match[1])}.{_LAYER_NAMES[match[2]][0]}"
        else:
            name = _OTHER_NAMES[local_name][0]
        yield parameter, placement_of(name, stage.architecture)


def placement_of(name: str, architecture: Architecture) -> Placement:
    """How the whole tensor of a canonical name is cut over tensor-parallel ranks."""
    return Placement(
        name,
        _SHARD_DIMS[re.sub(r"^blocks\.\d+\.", "", name)],
        qkv_heads=architecture.num_heads if name.endswith("qkv.weight") else 0,
        is_gated=architecture.mlp == "swiglu" and ".mlp.dense_in." in name,
        vocab_size=architecture.vocab_size if name in _VOCABULARY_TENSORS else 0,
    )


def part_of(name: str) -> str:
    """The part in `PARTS` to which the tensor of a canonical name belongs."""
    if "norm" in name:
        return "norm"
    return next(part for part in PARTS if part in name)


def stage_of(name: str, architecture: Architecture, pp: int, virtual_stages: int = 1) -> int:
    """The pipeline rank that holds a whole tensor.

    Args:
        name: canonical name.
        pp: number of pipeline ranks.
        virtual_stages: runs of layers per rank, which are dealt to the ranks in turn (arXiv 2104.04473).
    """
    match = re.match(r"blocks\.(\d+)\.", name)
    if match:
        return int(match[1]) * pp * virtual_stages // architecture.num_layers % pp
    return pp - 1 if name.startswith(("final_norm.", "head.")) else 0


def canonical_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all whole tensors of a network, in file order, which is that of the plain model's
    state dict."""
    h, v, d = architecture.hidden_size, architecture.vocab_size, architecture.noise_dim
    f, g = architecture.mlp_size, architecture.mask_embedding_size

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if architecture.norm_has_bias else ("weight",)
        return {f"{name}.{part}": (width,) for part in parts}

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
        return {**weight, f"{name}.bias": (rows,)} if architecture.bias else weight

    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (v, h)}
    if architecture.num_masks:
        shapes["mask_embedding.table.weight"] = (architecture.num_masks, h)
    elif d:
        shapes["mask_embedding.dense_in.weight"] = (g, d)
        shapes["mask_embedding.dense_in.bias"] = (g,)
        shapes["mask_embedding.dense_out.weight"] = (h, g)
    if architecture.noise_fourier:
        shapes["mask_embedding.dense_fourier.weight"] = (g, architecture.num_noise_features)
    for i in range(architecture.num_layers):
        block = norm("norm1", h) | {"attention.qkv.weight": (3 * h, h), "attention.out.weight": (h, h)}
        if architecture.qk_norm:
            block |= norm("attention.q_norm", architecture.head_dim)
            block |= norm("attention.k_norm", architecture.head_dim)
        block |= norm("norm2", h)
        block |= linear("mlp.dense_in", architecture.mlp_inputs, h) | linear("mlp.dense_out", h, f)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | norm("final_norm", h) | linear("head", v, h)


def initial_weight(name: str, shape: tuple[int, ...], architecture: Architecture, seed: int) -> Tensor:
    """Initial value of a whole tensor: a pure function of (seed, name), the same for every layout.

    The laws are the IMDM reference's: linears N(0, initializer_range); token embedding uniform on
    +-1/sqrt(H); the noise's first layer a normal of standard deviation .02 cut at two of them; the noise's
    second layer, the layer of its Fourier features (which the reference has not), the embeddings of finitely many
    masks, the head and all biases zero; norms one.

    Returns:
        float32 tensor of `shape`.
    """
    if name.endswith("bias") or name in _INITIALLY_ZERO:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    tensor_id = torch.tensor([zlib.crc32(name.encode())], dtype=torch.int64)
    u = uniform(seed, tensor_id, Purpose.INIT, 0, shape[0], shape[1], dtype=torch.float64)[0]
    if name == "token_embedding.weight":
        return ((2 * u - 1) / math.sqrt(shape[1])).float()
    if name == "mask_embedding.dense_in.weight":
        cut = math.erf(2 / math.sqrt(2))
        return (0.02 * math.sqrt(2) * torch.erfinv(cut * (2 * u - 1))).float()
    centred = (2 * u - 1).clamp(min=-1 + 2**-53)
    return (architecture.initializer_range * math.sqrt(2) * torch.erfinv(centred)).float()
