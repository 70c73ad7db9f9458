"""One transformer layer: the specification that Megatron-core builds its layers from.

A pre-norm block with LayerNorm, rotary full attention and a tanh-GELU MLP, which is what MDLM's
time-independent adaLN block folds to. Megatron's layouts: S positions, B batch, heads, head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from imdm_scale.diffusion.noise import Purpose, uniform


@dataclass(frozen=True)
class DropoutKey:
    """What dropout is a pure function of: the run's seed, the optimizer step and the samples' ids."""

    seed: int
    step: int
    sample_ids_B: Tensor


class DropoutAdd:
    """Residual addition with counter-based dropout, in the place of Megatron's bias-dropout-add.

    Counter-based, so that a sample's dropout is the same whatever rank or micro-batch it falls into, and a
    recomputed activation needs no saved RNG state. The stage sets `key` before each training forward and
    `site`, the operation's place in the network, once.
    """

    def __init__(self) -> None:
        self.site = 0
        self.num_sites = 1
        self.key: DropoutKey | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Megatron's two-step interface: returns the function of ((x, bias), residual, probability)."""

        def add(
            x_with_bias: tuple[Tensor, Tensor | None], residual_SBH: Tensor, probability: float
        ) -> Tensor:
            x_SBH, bias = x_with_bias
            if bias is not None:
                x_SBH = x_SBH + bias
            if training and probability > 0:
                x_SBH = x_SBH * self._scaled_keep(x_SBH, probability)
            return residual_SBH + x_SBH

        return add

    def _scaled_keep(self, x_SBH: Tensor, probability: float) -> Tensor:
        assert self.key is not None, "a training forward with dropout needs the stage's dropout key"
        length, _, width = x_SBH.shape
        step = self.key.step * self.num_sites + self.site
        u_BSH = uniform(self.key.seed, self.key.sample_ids_B, Purpose.DROPOUT, step, length, width)
        return (u_BSH >= probability).transpose(0, 1).to(x_SBH.dtype) / (1 - probability)


class CoreAttention(MegatronModule):
    """Full bidirectional attention by torch's scaled_dot_product_attention, with optional score softcap."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        **megatron_options: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.softcap = softcap

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **megatron_options: Any,
    ) -> Tensor:
        """Attention of (S, B, heads, head width) tensors; the mask is True where attention is forbidden."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        allowed = None if attention_mask is None else ~attention_mask
        if self.softcap > 0:
            scale = query.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale
            scores = self.softcap * torch.tanh(query @ key.transpose(-1, -2) * scale / self.softcap)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))
            out = scores.softmax(dim=-1) @ value
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=self.softmax_scale
            )
        return out.permute(2, 0, 1, 3).flatten(2)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with Megatron's constructor, its parameters tagged for sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **megatron_options: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class HeadLayerNorm(LayerNorm):
    """The LayerNorm that all heads share, of queries or of keys.

    A tensor-parallel rank has some of the heads, so its gradient of the shared parameters is a part of the sum.
    """

    def __init__(self, *args: Any, tp_group: ProcessGroup, **megatron_options: Any) -> None:
        super().__init__(*args, **megatron_options)
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, the head's width."""
        weight = copy_to_tensor_model_parallel_region(self.weight, self.tp_group)
        bias = copy_to_tensor_model_parallel_region(self.bias, self.tp_group)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class AttentionInput(ColumnParallelLinear):
    """The fused q, k, v projection without a bias (MDLM has none), while the MLP's linears have theirs."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class AttentionOutput(RowParallelLinear):
    """Attention's output projection, without a bias too."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


def layer_spec(qk_norm: bool, softcap: float, tp_group: ProcessGroup) -> ModuleSpec:
    """Megatron's local layer specification with this project's attention, norms and residual addition."""
    spec = get_gpt_layer_local_spec(normalization="LayerNorm", qk_layernorm=qk_norm)
    layer = spec.submodules
    attention = layer.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.no_mask
    attention.submodules.core_attention = ModuleSpec(module=CoreAttention, params={"softcap": softcap})
    attention.submodules.linear_qkv = AttentionInput
    attention.submodules.linear_proj = AttentionOutput
    if qk_norm:
        norm = ModuleSpec(module=HeadLayerNorm, params={"tp_group": tp_group})
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    layer.input_layernorm = layer.pre_mlp_layernorm = LayerNorm
    layer.self_attn_bda = layer.mlp_bda = DropoutAdd
    return spec
