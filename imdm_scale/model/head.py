"""Hidden states to logits, over a vocabulary that tensor-parallel ranks hold in shards.

Shapes: N positions, H width, V one shard of the vocabulary.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.likelihood import FORBIDDEN_LOGIT
from imdm_scale.model.placement import Placement, padded_vocab_size
from imdm_scale.model.vocabulary import ShardedVocabulary


def sharded_vocabulary(architecture: Architecture, groups: ProcessGroupCollection) -> ShardedVocabulary:
    """The vocabulary as the tensor-parallel ranks hold it."""
    tp = groups.tp.size()
    return ShardedVocabulary(groups.tp, padded_vocab_size(architecture.vocab_size, tp) // tp)


def head_names(architecture: Architecture) -> tuple[str, ...]:
    """Canonical names of the head's tensors."""
    return ("head.weight", "head.bias") if architecture.bias else ("head.weight",)


def forbid_padding(logits_NV: Tensor, first_id: int, vocab_size: int) -> Tensor:
    """The logits with the forbidden one in the columns of padded ids; only the last shard has any."""
    padding = first_id + logits_NV.size(-1) - vocab_size
    if padding <= 0:
        return logits_NV
    forbidden = logits_NV.new_full((logits_NV.size(0), padding), FORBIDDEN_LOGIT)
    return torch.cat((logits_NV[:, :-padding], forbidden), dim=-1)


class Head(ColumnParallelLinear):
    """The trained head of a network's last stage."""

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            architecture.hidden_size,
            padded_vocab_size(architecture.vocab_size, groups.tp.size()),
            config=config,
            init_method=config.init_method,
            bias=architecture.bias,
            gather_output=False,
            tp_group=groups.tp,
        )
        self.vocab_size = architecture.vocab_size
        self.first_id = sharded_vocabulary(architecture, groups).first_id

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V); the hidden states must be whole on every rank, and so will be their gradient."""
        return forbid_padding(super().forward(hidden_NH)[0], self.first_id, self.vocab_size)


class FrozenHead(nn.Module):
    """This rank's shard of a head that is not trained: where a teacher's hidden states become logits.

    It stands apart from the teacher's network, since the logits may be needed elsewhere and cut otherwise than
    that network is: on the student's last stage, in the student's tensor-parallel layout, for the loss.

    Args:
        architecture: the teacher's.
        groups: of the ranks that hold the shards.
        dtype: of the weights and the logits.
        device: where they are.
    """

    def __init__(
        self,
        architecture: Architecture,
        groups: ProcessGroupCollection,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.vocabulary = sharded_vocabulary(architecture, groups)
        self.tp_rank, self.tp_size = groups.tp.rank(), groups.tp.size()
        self.vocab_size = architecture.vocab_size
        shard = padded_vocab_size(self.vocab_size, self.tp_size) // self.tp_size
        self.weight = nn.Parameter(
            torch.empty(shard, architecture.hidden_size, dtype=dtype, device=device), requires_grad=False
        )
        self.bias = None
        if architecture.bias:
            self.bias = nn.Parameter(torch.empty(shard, dtype=dtype, device=device), requires_grad=False)

    @torch.no_grad()
    def write(self, name: str, whole: Tensor) -> None:
        """Take this rank's shard of the whole tensor that is called `head.weight` or `head.bias`."""
        parameter = {"head.weight": self.weight, "head.bias": self.bias}[name]
        assert parameter is not None, "a network without biases has none in its head"
        placement = Placement(name, shard_dim=0, vocab_size=self.vocab_size)
        parameter.copy_(placement.to_shard(whole, self.tp_rank, self.tp_size))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of hidden states in the head's dtype; padded ids hold the forbidden logit."""
        logits_NV = hidden_NH @ self.weight.t()
        if self.bias is not None:
            logits_NV = logits_NV + self.bias
        return forbid_padding(logits_NV, self.vocabulary.first_id, self.vocab_size)
