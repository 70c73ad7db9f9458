"""The transformer layers that one pipeline stage holds, and the final norm after the last of them.

In the place of Megatron-core's TransformerBlock, whose recomputation needs its trackers of CUDA's random numbers
and knows nothing of a micro-batch's dropout key.

Shapes: L positions, S those of them that this rank holds between layers (L, or L / TP where sequence-parallel),
B batch, H width, K width of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.layer import DropoutKey, layer_spec, recomputed

Recompute = Literal["none", "selective", "full"]
"""What is computed again in the backward pass: nothing, the attention's core, or whole layers."""


@lru_cache(maxsize=32)
def rotary_angles(length: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Angles (L, 1, 1, K), float32, of the rotary embedding (arXiv 2104.09864) in Megatron's layout."""
    inverse_frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequency)
    return angles.repeat(1, 2)[:, None, None, :].to(device)


class Decoder(nn.Module):
    """A contiguous run of the network's layers.

    Args:
        config: Megatron's description of the network, sequence parallelism included.
        architecture: shape of the whole network.
        groups: this rank's process groups.
        recompute: see `Recompute`.
        num_layers: number of layers of this stage.
        has_final_norm: whether these are the network's last layers.
        virtual_stage: which of this rank's runs of layers this is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        groups: ProcessGroupCollection,
        recompute: Recompute,
        num_layers: int,
        has_final_norm: bool,
        virtual_stage: int,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.recompute_layers = recompute == "full"
        self.num_sequence_shards = groups.tp.size() if config.sequence_parallel else 1
        spec = layer_spec(architecture, groups.tp, config.sequence_parallel, recompute == "selective")
        self.layers = nn.ModuleList(
            build_module(
                spec, config=config, layer_number=i + 1, pg_collection=groups, vp_stage=virtual_stage
            )
            for i in range(num_layers)
        )
        for layer in self.layers:
            # Megatron adds residuals under torch.enable_grad, even within torch.no_grad.
            layer.bias_dropout_add_exec_handler = nullcontext
            first_site = 2 * (layer.layer_number - 1)
            layer.self_attn_bda.site, layer.mlp_bda.site = first_site, first_site + 1
        self.final_layernorm = (
            build_module(
                spec.submodules.input_layernorm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
            if has_final_norm
            else None
        )

    def forward(self, hidden_SBH: Tensor, dropout_key: DropoutKey | None) -> Tensor:
        """Hidden states (S, B, H) after this stage's layers.

        Args:
            hidden_SBH: hidden states before them.
            dropout_key: needed in training where dropout is on.
        """
        rotary_L11K = rotary_angles(
            hidden_SBH.size(0) * self.num_sequence_shards,
            self.architecture.head_dim,
            self.architecture.rope_base,
            hidden_SBH.device,
        )
        for layer in self.layers:
            run = partial(_run_layer, layer, dropout_key, rotary_L11K)
            if self.recompute_layers and torch.is_grad_enabled():
                hidden_SBH = recomputed(run, hidden_SBH)
            else:
                hidden_SBH = run(hidden_SBH)
        return hidden_SBH if self.final_layernorm is None else self.final_layernorm(hidden_SBH)


def _run_layer(
    layer: TransformerLayer, dropout_key: DropoutKey | None, rotary_L11K: Tensor, hidden_SBH: Tensor
) -> Tensor:
    """One layer under its micro-batch's dropout key.

    The key is set here, not once a forward pass: in a pipeline a layer is computed again for one micro-batch after
    it has been computed for later ones.
    """
    layer.self_attn_bda.key = layer.mlp_bda.key = dropout_key
    return layer(hidden_SBH, attention_mask=None, rotary_pos_emb=rotary_L11K)[0]
