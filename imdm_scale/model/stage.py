"""The IMDM as Megatron-core modules: one pipeline stage of it (the whole network where there is one stage).

Shapes: B batch, L positions, D noise dimensions, N selected positions, H width, V one shard of the vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.likelihood import FORBIDDEN_LOGIT
from imdm_scale.model.embedding import InputEmbedding
from imdm_scale.model.layer import DropoutAdd, DropoutKey, LayerNorm, layer_spec
from imdm_scale.model.vocabulary import ShardedVocabulary


def transformer_config(
    architecture: Architecture, tp: int = 1, pp: int = 1, dtype: torch.dtype = torch.float32
) -> TransformerConfig:
    """Megatron's description of the backbone. Weights are left uninitialised: see `model.weights`."""
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        ffn_hidden_size=architecture.mlp_size,
        normalization="LayerNorm",
        layernorm_epsilon=architecture.layer_norm_eps,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        add_qkv_bias=False,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=architecture.dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
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


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to equal shards. Padded ids are never seen outside the embedding and head."""
    return -(-vocab_size // tp) * tp


class ImdmStage(MegatronModule):
    """The layers that one pipeline rank holds; the first stage embeds, the last one has the head.

    Args:
        architecture: shape of the whole network.
        groups: this rank's process groups; no global parallel state is read.
        dtype: of the parameters and activations.
    """

    def __init__(
        self,
        architecture: Architecture,
        groups: ProcessGroupCollection,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        tp, pp = groups.tp.size(), groups.pp.size()
        config = transformer_config(architecture, tp, pp, dtype)
        super().__init__(config=config)
        self.architecture = architecture
        self.is_first = groups.pp.rank() == 0
        self.is_last = groups.pp.rank() == pp - 1
        vocab = padded_vocab_size(architecture.vocab_size, tp)
        self.vocabulary = ShardedVocabulary(groups.tp, vocab // tp)

        if self.is_first:
            self.embedding = InputEmbedding(config, architecture, groups, vocab)
        self.rotary = RotaryEmbedding(
            architecture.head_dim,
            rotary_percent=1.0,
            rotary_base=int(architecture.rope_base),
            use_cpu_initialization=True,
            cp_group=groups.cp,
        )
        spec = layer_spec(architecture.qk_norm, architecture.attention_softcap, groups.tp)
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                layer_specs=[spec] * (architecture.num_layers // pp), layer_norm=LayerNorm
            ),
            pre_process=self.is_first,
            post_process=self.is_last,
            pg_collection=groups,
        )
        if self.is_last:
            self.head = ColumnParallelLinear(
                architecture.hidden_size,
                vocab,
                config=config,
                init_method=config.init_method,
                bias=True,
                gather_output=False,
                tp_group=groups.tp,
            )
        self._dropout_adds = self._number_dropout_adds()

    def _number_dropout_adds(self) -> list[DropoutAdd]:
        adds = []
        for layer in self.decoder.layers:
            for place, add in enumerate((layer.self_attn_bda, layer.mlp_bda)):
                add.site = 2 * (layer.layer_number - 1) + place
                add.num_sites = 2 * self.architecture.num_layers
                adds.append(add)
        return adds

    def set_input_tensor(self, hidden_LBH: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output (Megatron's pipeline schedules call this)."""
        self.decoder.set_input_tensor(hidden_LBH[0] if isinstance(hidden_LBH, list) else hidden_LBH)

    def forward(
        self,
        input_ids_BL: Tensor,
        mask_noise_BLD: Tensor,
        positions_N: Tensor,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """Raw logits of the selected positions.

        Args:
            input_ids_BL: int64 token ids, masked positions holding the mask id.
            mask_noise_BLD: the noise e of every position; read at masked positions only.
            positions_N: int64 row-major indices into (B, L): where logits are wanted.
            dropout_key: needed in training where dropout is on.

        Returns:
            (N, V) logits of this rank's shard of the vocabulary on the last stage, where padded ids hold
            the forbidden logit; (L, B, H) hidden states on the others.
        """
        for add in self._dropout_adds:
            add.key = dropout_key
        hidden_LBH = self.embedding(input_ids_BL, mask_noise_BLD) if self.is_first else None
        hidden_LBH = self.decoder(
            hidden_states=hidden_LBH, attention_mask=None, rotary_pos_emb=self.rotary(input_ids_BL.size(1))
        )
        if not self.is_last:
            return hidden_LBH
        hidden_NH = hidden_LBH.transpose(0, 1).flatten(0, 1)[positions_N]
        logits_NV, _ = self.head(hidden_NH)
        padding = self.vocabulary.first_id + logits_NV.size(-1) - self.architecture.vocab_size
        if padding > 0:
            logits_NV = torch.cat(
                (logits_NV[:, :-padding], logits_NV.new_full((logits_NV.size(0), padding), FORBIDDEN_LOGIT)),
                dim=-1,
            )
        return logits_NV
