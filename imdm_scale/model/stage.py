"""The IMDM as Megatron-core modules: one pipeline stage of it (the whole network where there is one stage).

Shapes: B batch, L positions, S those of them that this rank holds between layers (L, or L / TP where
sequence-parallel), D noise dimensions, N selected positions, H width, V one shard of the vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.decoder import Decoder, Recompute
from imdm_scale.model.embedding import InputEmbedding
from imdm_scale.model.head import Head, sharded_vocabulary
from imdm_scale.model.layer import DropoutKey


def transformer_config(
    architecture: Architecture,
    tp: int = 1,
    pp: int = 1,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    virtual_stages: int = 1,
) -> TransformerConfig:
    """Megatron's description of the backbone. Weights are left uninitialised: see `model.weights`."""
    is_gated = architecture.mlp == "swiglu"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        ffn_hidden_size=architecture.mlp_size,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[architecture.norm],
        layernorm_epsilon=architecture.layer_norm_eps,
        activation_func=F.silu if is_gated else partial(F.gelu, approximate="tanh"),
        gated_linear_unit=is_gated,
        add_bias_linear=architecture.bias,
        add_qkv_bias=False,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=architecture.dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


class ImdmStage(MegatronModule):
    """A run of layers that one pipeline rank holds; the first one embeds, the last one has the head.

    Args:
        architecture: shape of the whole network.
        groups: this rank's process groups; no global parallel state is read.
        dtype: of the parameters and activations.
        sequence_parallel: whether tensor-parallel ranks share the sequence between attention and MLP.
        recompute: what is computed again in the backward pass: "none", "selective" (the attention's core) or
            "full" (whole layers).
        has_head: False leaves the last stage's head out, for networks whose hidden states are wanted.
        virtual_stage: which of this rank's runs of layers this is, where the schedule interleaves several.
        virtual_stages: how many runs of layers each rank has.
    """

    def __init__(
        self,
        architecture: Architecture,
        groups: ProcessGroupCollection,
        dtype: torch.dtype = torch.float32,
        *,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
        has_head: bool = True,
        virtual_stage: int = 0,
        virtual_stages: int = 1,
    ) -> None:
        tp, pp = groups.tp.size(), groups.pp.size()
        assert virtual_stages == 1 or pp > 1, "only a pipeline has virtual stages"
        assert architecture.num_layers % (pp * virtual_stages) == 0, "all stages have as many layers"
        config = transformer_config(architecture, tp, pp, dtype, sequence_parallel, virtual_stages)
        super().__init__(config=config)
        self.architecture = architecture
        self.tp_group = groups.tp
        self.is_first = groups.pp.rank() == 0 and virtual_stage == 0
        self.is_last = groups.pp.rank() == pp - 1 and virtual_stage == virtual_stages - 1
        self.vocabulary = sharded_vocabulary(architecture, groups)
        self.received_SBH: Tensor | None = None

        # Embedding and head work on the whole sequence.
        whole_sequence = transformer_config(architecture, tp, pp, dtype)
        if self.is_first:
            self.embedding = InputEmbedding(whole_sequence, architecture, groups, sequence_parallel)
        self.decoder = Decoder(
            config,
            architecture,
            groups,
            recompute,
            num_layers=architecture.num_layers // (pp * virtual_stages),
            has_final_norm=self.is_last,
            virtual_stage=virtual_stage,
        )
        self.has_head = self.is_last and has_head
        if self.has_head:
            self.head = Head(whole_sequence, architecture, groups)

    def set_input_tensor(self, hidden_SBH: Tensor | list[Tensor | None] | None) -> None:
        """Take the previous stage's output (Megatron's pipeline schedules call this)."""
        self.received_SBH = hidden_SBH[0] if isinstance(hidden_SBH, list) else hidden_SBH

    def forward(
        self,
        input_ids_BL: Tensor | None,
        mask_noise_BLD: Tensor | None,
        positions_N: Tensor | None,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """Raw logits of the selected positions.

        Args:
            input_ids_BL: int64 token ids, masked positions holding the mask id; read by the first stage only.
            mask_noise_BLD: the noise e of every position; read at masked positions, by the first stage only.
            positions_N: int64 row-major indices into (B, L): where logits are wanted; read by the last stage
                only.
            dropout_key: needed in training where dropout is on.

        Returns:
            On the last stage (N, V) logits of this rank's shard of the vocabulary, where padded ids hold the
            forbidden logit, or without a head the final hidden states (N, H), whole on every tensor-parallel
            rank; on the others hidden states (S, B, H).
        """
        hidden_SBH = self.embedding(input_ids_BL, mask_noise_BLD) if self.is_first else self.received_SBH
        hidden_SBH = self.decoder(hidden_SBH, dropout_key)
        if not self.is_last:
            return hidden_SBH
        hidden_LBH = hidden_SBH
        if self.config.sequence_parallel:
            # What follows is the same on every rank and has the whole gradient, so each takes its shard of it.
            hidden_LBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden_NH = hidden_LBH.transpose(0, 1).flatten(0, 1)[positions_N]
        return self.head(hidden_NH) if self.has_head else hidden_NH
