"""Which rank is what: from (world size, tensor and pipeline parallel sizes) to explicit process groups.

Tensor parallel ranks are innermost, so that they stay within a node; pipeline stages outermost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class RoleLayout:
    """One role's (the student's or the teacher's) groups as seen by this rank."""

    collection: ProcessGroupCollection
    """What Megatron-core's modules take."""
    mpu: ModelParallelUnit
    """What DeepSpeed takes."""

    @property
    def tp_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self.collection.tp.rank()

    @property
    def tp_size(self) -> int:
        """Number of vocabulary and head shards."""
        return self.collection.tp.size()

    @property
    def dp_rank(self) -> int:
        """Rank within the data-parallel group: which part of the global batch this rank computes."""
        return self.collection.dp.rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.collection.dp.size()


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface over explicit groups."""

    def __init__(
        self, tp: dist.ProcessGroup, pp: dist.ProcessGroup, dp: dist.ProcessGroup, mp: dist.ProcessGroup
    ):
        self.tp, self.pp, self.dp, self.mp = tp, pp, dp, mp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size()

    def get_data_parallel_rank(self) -> int:
        return self.dp.rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.dp)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mp

    def get_model_parallel_world_size(self) -> int:
        return self.mp.size()

    def get_model_parallel_rank(self) -> int:
        return self.mp.rank()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp.size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp.rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self.pp

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pp.size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pp.rank()


def _my_group(rank_rows: torch.Tensor) -> dist.ProcessGroup:
    """Make one group per row (all ranks must call this together) and return the one this rank is in."""
    mine = None
    for row in rank_rows.tolist():
        group = dist.new_group(row)
        if dist.get_rank() in row:
            mine = group
    assert mine is not None, "every rank is in one row"
    return mine


def build_layout(tp: int, pp: int) -> RoleLayout:
    """Groups of one role over the whole world. Collective: every rank calls it with the same sizes.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size; tp * pp divides the world size (the configuration's check says so kindly).
    """
    world = dist.get_world_size()
    dp = world // (tp * pp)
    if dp * tp * pp != world:
        raise ValueError(f"world size {world} is not a multiple of tp {tp} x pp {pp}")
    ranks = torch.arange(world).view(pp, dp, tp)
    groups = ProcessGroupCollection()
    groups.tp = _my_group(ranks.reshape(-1, tp))
    groups.dp = groups.dp_cp = groups.expt_dp = _my_group(ranks.transpose(1, 2).reshape(-1, dp))
    groups.pp = _my_group(ranks.permute(1, 2, 0).reshape(-1, pp))
    groups.mp = _my_group(ranks.transpose(0, 1).reshape(dp, pp * tp))
    groups.cp = groups.ep = groups.expt_tp = _my_group(torch.arange(world).view(world, 1))
    groups.tp_cp = groups.tp
    groups.embd = groups.pos_embd = groups.hcp = None
    return RoleLayout(groups, ModelParallelUnit(groups.tp, groups.pp, groups.dp, groups.mp))
