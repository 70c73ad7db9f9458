"""One transformer layer: the specification that Megatron-core builds its layers from.

A pre-norm block with LayerNorm, rotary full attention and a tanh-GELU MLP, which is what MDLM's
time-independent adaLN block folds to; or with RMSNorm, SwiGLU and no biases, which is Llama's.
Megatron's layouts: S positions, B batch, heads, head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.model.linear import AttentionInput, AttentionOutput, ColumnLinear, RowLinear


@dataclass(frozen=True)
class DropoutKey:
    """What dropout is a pure function of: the run's seed, the optimizer step and the samples' ids."""

    seed: int
    step: int
    sample_ids_B: Tensor


class DropoutAdd:
    """Residual addition with counter-based dropout, in the place of Megatron's bias-dropout-add.

    Counter-based, so that a sample's dropout is the same whatever rank, micro-batch or shard of the sequence it
    falls into, and a recomputed activation needs no saved RNG state. The decoder sets `site`, the operation's
    place in the network, once, and `key` before each run of the layer.

    Args:
        num_sites: number of such operations in the whole network.
        sequence_rank: which shard of the sequence this rank works on; 0 where it works on all of it.
    """

    def __init__(self, num_sites: int = 1, sequence_rank: int = 0) -> None:
        self.num_sites = num_sites
        self.sequence_rank = sequence_rank
        self.site = 0
        self.key: DropoutKey | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Megatron's two-step interface: returns the function of ((x, None), residual, probability)."""

        def add(x_and_no_bias: tuple[Tensor, None], residual_SBH: Tensor, probability: float) -> Tensor:
            x_SBH, _ = x_and_no_bias
            if training and probability > 0:
                x_SBH = x_SBH * self._scaled_keep(x_SBH, probability)
            return residual_SBH + x_SBH

        return add

    def _scaled_keep(self, x_SBH: Tensor, probability: float) -> Tensor:
        assert self.key is not None, "a training forward with dropout needs the stage's dropout key"
        length, _, width = x_SBH.shape
        u_BSH = uniform(
            self.key.seed,
            self.key.sample_ids_B,
            Purpose.DROPOUT,
            self.key.step * self.num_sites + self.site,
            length,
            width,
            first_position=self.sequence_rank * length,
        )
        return (u_BSH >= probability).transpose(0, 1).to(x_SBH.dtype) / (1 - probability)


class CoreAttention(MegatronModule):
    """Full bidirectional attention by torch's scaled_dot_product_attention, with optional score softcap.

    Args:
        softcap: c > 0 turns scores into c * tanh(scores / c).
        recompute: keep only queries, keys and values, and attend again in the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        recompute: bool = False,
        **megatron_options: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.recompute = recompute

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **megatron_options: Any,
    ) -> Tensor:
        """Attention of (S, B, heads, head width) tensors; the mask is True where attention is forbidden."""
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._attend, query, key, value, attention_mask)
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
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
    """torch's LayerNorm with Megatron's constructor; has a bias where the network's linears have.

    Args:
        gradient_group: the ranks that apply these parameters to different parts of one activation (to shards of
            the sequence, or to some of the heads), over which their gradient is summed; None where every rank
            applies them to the whole.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        gradient_group: ProcessGroup | None = None,
        **megatron_options: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps, bias=config.add_bias_linear, dtype=config.params_dtype)
        self.gradient_group = gradient_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if self.gradient_group is None:
            return super().forward(x)
        weight = copy_to_tensor_model_parallel_region(self.weight, self.gradient_group)
        bias = self.bias
        if bias is not None:
            bias = copy_to_tensor_model_parallel_region(bias, self.gradient_group)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; the arguments are `LayerNorm`'s."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        gradient_group: ProcessGroup | None = None,
        **megatron_options: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.gradient_group = gradient_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = self.weight
        if self.gradient_group is not None:
            weight = copy_to_tensor_model_parallel_region(weight, self.gradient_group)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


NORMS: dict[str, type[LayerNorm | RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, computed again in the backward pass instead of keeping its activations.

    Reentrant, as DeepSpeed's own checkpointing is: its hooks, which gather ZeRO-3's parameters and count the gradients
    that come, then see a plain forward and backward pass. No RNG state is kept: the only randomness is counter-based.
    """
    return checkpoint(function, *inputs, use_reentrant=True, preserve_rng_state=False)


def layer_spec(
    architecture: Architecture, tp_group: ProcessGroup, sequence_parallel: bool, recompute_attention: bool
) -> ModuleSpec:
    """Megatron's local layer specification with this project's linears, attention, norms and residual addition."""
    spec = get_gpt_layer_local_spec(normalization="LayerNorm", qk_layernorm=architecture.qk_norm)
    layer, norm_class = spec.submodules, NORMS[architecture.norm]
    attention = layer.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.no_mask
    attention.submodules.core_attention = ModuleSpec(
        module=CoreAttention,
        params={"softcap": architecture.attention_softcap, "recompute": recompute_attention},
    )
    attention.submodules.linear_qkv = AttentionInput
    attention.submodules.linear_proj = AttentionOutput
    if architecture.qk_norm:
        # All heads share these norms, and a rank has some of the heads.
        head_norm = ModuleSpec(module=norm_class, params={"gradient_group": tp_group})
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = head_norm
    layer.mlp.submodules.linear_fc1 = ColumnLinear
    layer.mlp.submodules.linear_fc2 = RowLinear
    norm = ModuleSpec(module=norm_class, params={"gradient_group": tp_group if sequence_parallel else None})
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    layer.self_attn_bda = layer.mlp_bda = ModuleSpec(
        module=DropoutAdd,
        params={
            "num_sites": 2 * architecture.num_layers,
            "sequence_rank": tp_group.rank() if sequence_parallel else 0,
        },
    )
    return spec
