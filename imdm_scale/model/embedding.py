"""The input of a position: its token's embedding, plus the embedded noise where it is masked.

Shapes: B batch, L positions, S those of them that this rank keeps, D noise dimensions, N masked positions,
K Fourier features, F inner width, H width.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.finite_masks import mask_index
from imdm_scale.diffusion.fourier import fourier_features
from imdm_scale.model.placement import padded_vocab_size


class MaskEmbedding(MegatronModule):
    """g(e) = W2 GELU_erf(W1 e + Wf f(e) + b1), the embedding of a mask's noise (IMDM, arXiv 2605.10518; f are the
    Fourier features of noise coupling, if the network has any).

    W2 starts at zero, so that a fresh IMDM is the masked diffusion model whose weights it took, bit for bit. So
    does Wf: what a network without features computes, it still computes with them.
    """

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        hidden, inner = architecture.hidden_size, architecture.mask_embedding_size
        self.dense_in = ColumnParallelLinear(
            architecture.noise_dim,
            inner,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            tp_group=groups.tp,
        )
        self.dense_out = RowParallelLinear(
            inner,
            hidden,
            config=config,
            init_method=config.init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )
        self.noise_law = (architecture.noise_kind, architecture.noise_scale)
        self.num_frequencies = architecture.noise_fourier
        self.dense_fourier = None
        if architecture.noise_fourier:
            self.dense_fourier = ColumnParallelLinear(
                architecture.num_noise_features,
                inner,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )

    def forward(self, noise_ND: Tensor) -> Tensor:
        """Embedding (N, H), in the weights' type, of the float32 noise of N masked positions."""
        dtype = self.config.params_dtype
        inner_NF, _ = self.dense_in(noise_ND.to(dtype))
        if self.dense_fourier is not None:
            features_NK = fourier_features(noise_ND, self.num_frequencies, *self.noise_law)
            inner_NF = inner_NF + self.dense_fourier(features_NK.to(dtype))[0]
        return self.dense_out(F.gelu(inner_NF))[0]


class FiniteMaskEmbedding(MegatronModule):
    """g(e) is one of K vectors (IMDM's finite variant), all of which start at zero. Whole on every rank."""

    def __init__(self, config: TransformerConfig, architecture: Architecture) -> None:
        super().__init__(config=config)
        self.noise_law = (architecture.noise_kind, architecture.noise_scale)
        self.num_masks = architecture.num_masks
        self.table = nn.Embedding(architecture.num_masks, architecture.hidden_size, dtype=config.params_dtype)

    def forward(self, noise_ND: Tensor) -> Tensor:
        """Embedding (N, H), in the weights' type, of the float32 noise of N masked positions."""
        return self.table(mask_index(noise_ND, self.num_masks, *self.noise_law))


class InputEmbedding(MegatronModule):
    """E[x] + 1[x = mask] g(e), computed for the masked positions only.

    Args:
        config: Megatron's description of the network, without sequence parallelism: a position is embedded by
            all tensor-parallel ranks together.
        architecture: shape of the network.
        groups: this rank's process groups.
        sequence_parallel: whether each rank then keeps its shard of the sequence only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        groups: ProcessGroupCollection,
        sequence_parallel: bool,
    ) -> None:
        super().__init__(config=config)
        self.sequence_parallel = sequence_parallel
        self.tp_group = groups.tp
        self.mask_token_id = architecture.mask_token_id
        self.token_embedding = VocabParallelEmbedding(
            padded_vocab_size(architecture.vocab_size, groups.tp.size()),
            architecture.hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=groups.tp,
        )
        self.mask_embedding: MaskEmbedding | FiniteMaskEmbedding | None = None
        if architecture.num_masks:
            self.mask_embedding = FiniteMaskEmbedding(config, architecture)
        elif architecture.noise_dim:
            self.mask_embedding = MaskEmbedding(config, architecture, groups)

    def forward(self, input_ids_BL: Tensor, mask_noise_BLD: Tensor) -> Tensor:
        """Input of the first layer in Megatron's layout, (S, B, H)."""
        hidden_BLH = self.token_embedding(input_ids_BL)
        if self.mask_embedding is not None:
            masked = (input_ids_BL == self.mask_token_id).nonzero(as_tuple=True)
            g_NH = self.mask_embedding(mask_noise_BLD[masked])
            hidden_BLH = hidden_BLH.index_put(masked, g_NH, accumulate=True)
        hidden_LBH = hidden_BLH.transpose(0, 1).contiguous()
        if not self.sequence_parallel:
            return hidden_LBH
        return scatter_to_sequence_parallel_region(hidden_LBH, self.tp_group)
