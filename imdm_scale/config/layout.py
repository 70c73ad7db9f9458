"""Which rank is what: from the settings and the number of processes to ranks, by arithmetic alone.

A role (student or teacher) has an ascending list of ranks. The rank at index (pp * DP + dp) * TP + tp of that list
computes pipeline stage pp of data-parallel replica dp and holds tensor-parallel shard tp: tensor-parallel
ranks are innermost, so that they stay within a node, and pipeline stages, which talk least, are outermost.
"""

from __future__ import annotations

from dataclasses import dataclass

from imdm_scale.config.splits import ImpossibleLayout, check_split, micro_batch_size
from imdm_scale.config.tree import Config


@dataclass(frozen=True)
class RankPlace:
    """Coordinates of a rank within a role."""

    pp: int
    """Pipeline stage."""
    dp: int
    """Data-parallel replica."""
    tp: int
    """Tensor-parallel shard."""

    def __str__(self) -> str:
        return f"stage {self.pp}, replica {self.dp}, shard {self.tp}"


@dataclass(frozen=True)
class RoleLayout:
    """How one network is split over its ranks."""

    role: str
    """`student` or `teacher`."""
    ranks: tuple[int, ...]
    """Global ranks of the role, ascending; their number is a multiple of tp * pp."""
    tp: int
    """Tensor-parallel size."""
    pp: int
    """Pipeline-parallel size."""
    sequence_parallel: bool
    """Whether the tensor-parallel ranks also share the sequence between layers."""
    zero_stage: int
    """ZeRO stage of the role's engine."""
    micro_batch_size: int
    """Blocks of text that one replica passes through the network at a time."""
    virtual_stages: int = 1
    """Stages that each pipeline rank holds, interleaved where there are more than one."""

    @property
    def dp(self) -> int:
        """Data-parallel size: number of replicas of the network."""
        return len(self.ranks) // (self.tp * self.pp)

    def rank_at(self, pp: int, dp: int, tp: int) -> int:
        """Global rank of a place."""
        return self.ranks[(pp * self.dp + dp) * self.tp + tp]

    def place_of(self, rank: int) -> RankPlace:
        """Place of a global rank.

        Raises:
            ValueError: the rank is none of this role's.
        """
        replica, tp = divmod(self.ranks.index(rank), self.tp)
        pp, dp = divmod(replica, self.dp)
        return RankPlace(pp, dp, tp)

    @property
    def tp_groups(self) -> list[tuple[int, ...]]:
        """Global ranks that share each layer: one group for each stage of each replica."""
        return [
            tuple(self.rank_at(pp, dp, tp) for tp in range(self.tp))
            for pp in range(self.pp)
            for dp in range(self.dp)
        ]

    @property
    def dp_groups(self) -> list[tuple[int, ...]]:
        """Global ranks that hold the same part of the network: one group for each shard of each stage."""
        return [
            tuple(self.rank_at(pp, dp, tp) for dp in range(self.dp))
            for pp in range(self.pp)
            for tp in range(self.tp)
        ]

    @property
    def pp_groups(self) -> list[tuple[int, ...]]:
        """Global ranks that hand activations on, first stage first: one group for each shard of each replica."""
        return [
            tuple(self.rank_at(pp, dp, tp) for pp in range(self.pp))
            for dp in range(self.dp)
            for tp in range(self.tp)
        ]

    @property
    def model_groups(self) -> list[tuple[int, ...]]:
        """Global ranks of each replica, by stage and then by shard."""
        return [
            tuple(self.rank_at(pp, dp, tp) for pp in range(self.pp) for tp in range(self.tp))
            for dp in range(self.dp)
        ]


@dataclass(frozen=True)
class RunLayout:
    """Both roles of a run."""

    world_size: int
    """Number of processes."""
    placement: str
    """`colocated` (both roles on every rank) or `disaggregated` (no rank has both)."""
    student: RoleLayout
    """The network that is trained."""
    teacher: RoleLayout | None
    """The frozen network; None for a method without a teacher."""

    @property
    def roles(self) -> tuple[RoleLayout, ...]:
        """The student, and the teacher if there is one."""
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    def label(self, rank: int) -> str:
        """What a rank is, in words: `teacher: stage 0, replica 1, shard 0`."""
        return "; ".join(f"{role.role}: {role.place_of(rank)}" for role in self.roles if rank in role.ranks)


def run_layout(config: Config, world_size: int, zero_stage: int) -> RunLayout:
    """The layout that `config` describes on `world_size` processes.

    Args:
        config: settings whose numbers are within their ranges; for a `config` that passed `check_config` with the
            same `world_size` nothing is raised.
        world_size: number of processes.
        zero_stage: the student's, `zero_optimization.stage` of the DeepSpeed JSON.

    Raises:
        ImpossibleLayout: `teacher.ranks` does not fit the processes, or a network cannot be split over its ranks as
            asked; with the nearest possible values.
    """
    student_ranks, teacher_ranks = role_ranks(config, world_size)
    student, teacher = _role_layout(config, "student", student_ranks, zero_stage, world_size), None
    if teacher_ranks is not None:
        # ZeRO-1 and ZeRO-2 partition nothing that a frozen network has.
        stage = config.teacher.zero_stage
        stage = (3 if zero_stage == 3 else 0) if stage is None else stage
        teacher = _role_layout(config, "teacher", teacher_ranks, stage, world_size)
    placement = "colocated" if teacher is None else config.teacher.placement
    return RunLayout(world_size, placement, student, teacher)


def role_ranks(config: Config, world_size: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Global ranks of the student and of the teacher (None for a method without one), each ascending.

    Raises:
        ImpossibleLayout: `teacher.ranks` does not fit the processes or the placement.
    """
    world = tuple(range(world_size))
    teacher = config.teacher
    if not config.method.has_teacher:
        return world, None
    if teacher.placement == "colocated":
        if teacher.ranks is not None:
            raise ImpossibleLayout(
                f"teacher.ranks is {teacher.ranks}, but teacher.placement is colocated, which puts the teacher on "
                "every rank; leave teacher.ranks null, or set teacher.placement=disaggregated.",
                ["teacher.ranks=null", "teacher.placement=disaggregated"],
            )
        return world, world
    if world_size == 1:
        raise ImpossibleLayout(
            "teacher.placement is disaggregated, which needs a rank for the teacher and one for the student, but "
            "there is 1 process; start at least 2, or set teacher.placement=colocated.",
            ["teacher.placement=colocated"],
        )
    chosen = world_size // 2 if teacher.ranks is None else teacher.ranks
    count = chosen if isinstance(chosen, int) else len(chosen)
    allowed = "1" if world_size == 2 else f"1 to {world_size - 1}"
    near = [f"teacher.ranks={min(max(count, 1), world_size - 1)}"]
    if not 0 < count < world_size:
        raise ImpossibleLayout(
            f"teacher.ranks is {chosen}, but of {world_size} processes the teacher needs at least 1 and must leave "
            f"the student at least 1; give {allowed} of them.",
            near,
        )
    if isinstance(chosen, int):
        chosen = list(world[-chosen:])
    outside = sorted(set(chosen) - set(world))
    if outside or len(set(chosen)) < count:
        fault = (
            f"rank {outside[0]} is none of the {world_size} processes" if outside else "a rank is named twice"
        )
        raise ImpossibleLayout(
            f"teacher.ranks is {chosen}, but {fault}; list different ranks from 0 to {world_size - 1}, or give "
            "their number.",
            near,
        )
    return tuple(sorted(set(world) - set(chosen))), tuple(sorted(chosen))


def _role_layout(
    config: Config, role: str, ranks: tuple[int, ...], zero_stage: int, world_size: int
) -> RoleLayout:
    check_split(config, role, len(ranks), world_size)
    parallel = getattr(config.parallel, role)
    return RoleLayout(
        role=role,
        ranks=ranks,
        tp=parallel.tp,
        pp=parallel.pp,
        sequence_parallel=parallel.sequence_parallel,
        zero_stage=zero_stage,
        micro_batch_size=micro_batch_size(config, role),
        virtual_stages=parallel.virtual_stages,
    )
