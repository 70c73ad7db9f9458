"""Into which tensor-parallel shards and pipeline stages a network can be split over a number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imdm_scale.config.architecture import architecture_of
from imdm_scale.config.nearest import either
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError


class ImpossibleLayout(UserError):
    """A layout that cannot be; `near` has the nearest possible ones as `key=value` words, nearest first."""

    def __init__(self, message: str, near: Sequence[str]) -> None:
        super().__init__(message)
        self.near = tuple(near)


@dataclass(frozen=True)
class Split:
    """Parts into which each replica of a network is cut."""

    tp: int
    """Tensor-parallel shards."""
    pp: int
    """Pipeline stages."""

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp}"


def check_split(config: Config, role: str, num_ranks: int, world_size: int) -> None:
    """Refuses a split that the network's shape or the number of the role's ranks does not allow.

    Args:
        config: settings whose numbers are within their ranges.
        role: `student` or `teacher`.
        num_ranks: number of ranks of the role; fewer than `world_size` if the other role has ranks of its own.
        world_size: number of processes.

    Raises:
        ImpossibleLayout: with the nearest possible splits.
    """
    parallel = getattr(config.parallel, role)
    asked = Split(parallel.tp, parallel.pp)
    fault = _fault(config, role, num_ranks, asked)
    if fault is None:
        return
    near = nearest_splits(config, role, num_ranks)
    remedies = [f"nearest on {num_ranks} rank{'s' * (num_ranks > 1)}: {either(near[:3])}"] if near else []
    counts = _nearest_counts(config, role, num_ranks, world_size)
    if "sequence_parallel" in fault:
        remedies.append(f"set parallel.{role}.sequence_parallel=false")
    elif "virtual_stages" in fault:
        remedies.append(f"set parallel.{role}.virtual_stages=1")
    elif counts and _fault(config, role, asked.tp * asked.pp, asked) is None:
        counted = either(counts)
        apart = num_ranks < world_size
        remedies.append(
            f"give it {counted} ranks by teacher.ranks" if apart else f"start {counted} processes"
        )
    raise ImpossibleLayout(
        f"{fault}; {', or '.join(remedies)}.",
        [f"parallel.{role}.tp={split.tp} parallel.{role}.pp={split.pp}" for split in near[:8]],
    )


def nearest_splits(config: Config, role: str, num_ranks: int) -> list[Split]:
    """Every possible split of a role over `num_ranks` ranks, those nearest to the one asked for first.

    Near is a small |log(tp / asked tp)| + |log(pp / asked pp)|. Splits whose number of replicas does not suit
    `train.global_batch_size` come last.
    """
    asked = getattr(config.parallel, role)

    def misfit(split: Split) -> tuple[bool, float, int]:
        replicas = num_ranks // (split.tp * split.pp)
        whole_batches = config.train.global_batch_size % (micro_batch_size(config, role) * replicas) == 0
        distance = abs(math.log(split.tp / asked.tp)) + abs(math.log(split.pp / asked.pp))
        return not whole_batches, round(distance, 9), -split.tp

    return sorted(_possible(config, role, num_ranks), key=misfit)


def micro_batch_size(config: Config, role: str) -> int:
    """Blocks of text that one replica of a role computes at a time."""
    own = config.teacher.micro_batch_size if role == "teacher" else None
    return config.train.micro_batch_size if own is None else own


def _nearest_counts(config: Config, role: str, num_ranks: int, world_size: int) -> list[int]:
    """The numbers of ranks next to `num_ranks` over which a role can be split as asked."""
    apart = num_ranks < world_size
    roles = [role] if apart or not config.method.has_teacher else ["student", "teacher"]
    parallel = [getattr(config.parallel, name) for name in roles]
    unit = math.lcm(*(one.tp * one.pp for one in parallel))
    below = num_ranks // unit * unit
    return [count for count in (below, below + unit) if count and (count < world_size or not apart)]


def _possible(config: Config, role: str, num_ranks: int) -> Iterator[Split]:
    shape = architecture_of(config, vocab_size=1, mask_token_id=0)
    for tp in range(1, min(shape.num_heads, num_ranks) + 1):
        for pp in range(1, min(shape.num_layers, num_ranks // tp) + 1):
            if _fault(config, role, num_ranks, Split(tp, pp)) is None:
                yield Split(tp, pp)


def _fault(config: Config, role: str, num_ranks: int, split: Split) -> str | None:
    """What is wrong with a split, in words; None if nothing is."""
    shape = architecture_of(config, vocab_size=1, mask_token_id=0)
    setting, tp, pp = f"parallel.{role}", split.tp, split.pp
    if shape.num_heads % tp:
        return f"{setting}.tp is {tp}, which does not divide the {shape.num_heads} attention heads"
    if shape.mlp_size % tp:
        return f"{setting}.tp is {tp}, which does not divide the {shape.mlp_size} columns of the MLPs (model.mlp_size)"
    if shape.num_layers % pp:
        return f"{setting}.pp is {pp}, which does not divide the {shape.num_layers} layers"
    virtual = getattr(config.parallel, role).virtual_stages
    if virtual > 1 and pp == 1:
        return f"{setting}.virtual_stages is {virtual}, but {setting}.pp is 1, and only a pipeline has stages"
    if shape.num_layers % (pp * virtual):
        return (
            f"{setting}.pp x {setting}.virtual_stages is {pp} x {virtual}, which does not divide the "
            f"{shape.num_layers} layers"
        )
    if num_ranks % (tp * pp):
        return (
            f"{setting}.tp x {setting}.pp is {tp} x {pp} = {tp * pp}, which does not divide the {role}'s "
            f"{num_ranks} rank{'s' * (num_ranks > 1)}"
        )
    if getattr(config.parallel, role).sequence_parallel:
        if tp == 1:
            return f"{setting}.sequence_parallel is true, but {setting}.tp is 1, and tensor-parallel ranks share it"
        if shape.length % tp:
            return (
                f"{setting}.sequence_parallel is true, but {setting}.tp, {tp}, does not divide model.length, "
                f"{shape.length}"
            )
    return None
