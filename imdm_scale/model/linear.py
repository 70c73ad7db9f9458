"""The layer's linears: Megatron-core's tensor-parallel ones, made independent of its global state.

Three things differ. The sequence is gathered without Megatron's process-wide buffer, which two networks on
streams of their own would overwrite for each other. A bias is added where it lives, so that no parameter leaves
its module (DeepSpeed's ZeRO-3 keeps such a one whole until the optimizer's step). And what works on a shard of the
sequence sums its gradient over the group itself, so that it is right under any ZeRO stage.

Shapes: S positions (T where sequence-parallel ranks hold a shard each), B batch, H and F widths in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatheredLinear(torch.autograd.Function):
    """y = gather(x) W^T over a sequence-parallel group.

    Only the shard of x is kept for the backward pass, which gathers it again (arXiv 2205.05198, section 4.2.2),
    and the two collectives there run beside the two products.
    """

    @staticmethod
    def forward(ctx: Any, x_TBH: Tensor, weight_FH: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x_TBH, weight_FH)
        ctx.group = group
        x_SBH = x_TBH.new_empty(x_TBH.size(0) * group.size(), *x_TBH.shape[1:])
        dist.all_gather_into_tensor(x_SBH, x_TBH.contiguous(), group=group)
        return x_SBH @ weight_FH.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TBH, weight_FH = ctx.saved_tensors
        x_SBH = x_TBH.new_empty(x_TBH.size(0) * ctx.group.size(), *x_TBH.shape[1:])
        gathering = dist.all_gather_into_tensor(x_SBH, x_TBH.contiguous(), group=ctx.group, async_op=True)
        grad_SBH = grad_SBF @ weight_FH
        gathering.wait()
        grad_TBH = torch.empty_like(x_TBH, memory_format=torch.contiguous_format)
        scattering = dist.reduce_scatter_tensor(grad_TBH, grad_SBH, group=ctx.group, async_op=True)
        grad_FH = grad_SBF.flatten(0, 1).t() @ x_SBH.flatten(0, 1)
        scattering.wait()
        return grad_TBH, grad_FH, None


class ColumnLinear(ColumnParallelLinear):
    """A linear whose outputs are split over the group; its input may be a shard of the sequence."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(S or T, B, H) -> (S, B, F of this rank), and no bias to add."""
        if self.sequence_parallel:
            y_SBF, bias_F = _GatheredLinear.apply(x, self.weight, self.tp_group), self.bias
        else:
            y_SBF, bias_F = super().forward(x)
        return (y_SBF if bias_F is None else y_SBF + bias_F), None


class RowLinear(RowParallelLinear):
    """A linear whose inputs are split over the group; its output may be a shard of the sequence."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(S, B, H of this rank) -> (S or T, B, F), and no bias to add."""
        y, bias_F = super().forward(x)
        if bias_F is None:
            return y, None
        if self.sequence_parallel:
            bias_F = copy_to_tensor_model_parallel_region(bias_F, self.tp_group)
        return y + bias_F, None


class AttentionInput(ColumnLinear):
    """The fused q, k, v projection without a bias (MDLM has none), while the MLP's linears have theirs."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class AttentionOutput(RowLinear):
    """Attention's output projection, without a bias too."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)
