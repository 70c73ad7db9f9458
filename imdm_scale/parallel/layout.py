"""Explicit process groups from a run's layout. No global parallel state is made or read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from imdm_scale.config.layout import RoleLayout, RunLayout


@dataclass(frozen=True)
class RoleGroups:
    """One role's (the student's or the teacher's) groups as seen by one of its ranks."""

    layout: RoleLayout
    """Which rank is what."""
    collection: ProcessGroupCollection
    """What Megatron-core's modules and schedules take."""
    mpu: ModelParallelUnit
    """What DeepSpeed takes."""
    everyone: dist.ProcessGroup
    """All ranks of the role."""
    replica: dist.ProcessGroup | None
    """This rank's data-parallel replica over CPU memory, first its rank that reads the data; None if it is alone."""
    covers_world: bool
    """Whether every rank of the run is in the role."""

    @property
    def tp_rank(self) -> int:
        """Which shard of every layer and of the vocabulary."""
        return self.collection.tp.rank()

    @property
    def tp_size(self) -> int:
        """Number of vocabulary and head shards."""
        return self.collection.tp.size()

    @property
    def pp_rank(self) -> int:
        """Which pipeline stage."""
        return self.collection.pp.rank()

    @property
    def pp_size(self) -> int:
        """Number of pipeline stages."""
        return self.collection.pp.size()

    @property
    def dp_rank(self) -> int:
        """Which part of the global batch."""
        return self.collection.dp.rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.collection.dp.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether the network's output is computed here."""
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage(self) -> int:
        """Global rank of this rank's peer on the last stage."""
        return dist.get_global_rank(self.collection.pp, self.pp_size - 1)


@dataclass(frozen=True)
class RunGroups:
    """The groups of a run as seen by one rank; a role that the rank has no part in is None."""

    student: RoleGroups | None
    teacher: RoleGroups | None
    hand_over: dist.ProcessGroup
    """All ranks: for what goes from teacher to student and nothing else."""


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


def build_groups(layout: RunLayout, patience: float = 0.0) -> RunGroups:
    """Make the groups of both roles. Collective: every rank of the run calls it with the same layout.

    The roles share no group, so that their collectives may run at the same time.

    Args:
        patience: seconds that a message between the roles may wait for its receiver beside what an operation may
            take otherwise, so that the flow control's own time-out comes first.
    """
    return RunGroups(
        student=_role_groups(layout.student, layout.world_size),
        teacher=None if layout.teacher is None else _role_groups(layout.teacher, layout.world_size),
        hand_over=dist.new_group(timeout=timedelta(minutes=30, seconds=2 * patience)),
    )


def _role_groups(layout: RoleLayout, world_size: int) -> RoleGroups | None:
    tp = _my_group(layout.tp_groups)
    dp = _my_group(layout.dp_groups)
    pp = _my_group(layout.pp_groups)
    mp = _my_group(layout.model_groups)
    alone = _my_group([(rank,) for rank in layout.ranks])
    everyone = _my_group([layout.ranks])
    replica = None
    if layout.tp * layout.pp > 1:
        replica = _my_group(layout.model_groups, backend="gloo" if dist.get_backend() == "nccl" else None)
    if tp is None:
        return None
    collection = ProcessGroupCollection()
    collection.tp = collection.tp_cp = tp
    collection.dp = collection.dp_cp = collection.expt_dp = dp
    collection.pp = pp
    collection.mp = mp
    collection.cp = collection.ep = collection.expt_tp = alone
    collection.embd = collection.pos_embd = collection.hcp = None
    assert dp is not None and pp is not None and mp is not None and everyone is not None
    return RoleGroups(
        layout,
        collection,
        ModelParallelUnit(tp, pp, dp, mp),
        everyone,
        replica,
        len(layout.ranks) == world_size,
    )


def _my_group(ranks_of_groups: list[tuple[int, ...]], backend: str | None = None) -> dist.ProcessGroup | None:
    """Make one group for each tuple of ranks and return the one that this rank is in, if any."""
    mine = None
    for ranks in ranks_of_groups:
        group = dist.new_group(list(ranks), backend=backend)
        if dist.get_rank() in ranks:
            mine = group
    return mine
