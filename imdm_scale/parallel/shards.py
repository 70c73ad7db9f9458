"""Whole weights into and out of networks that are spread over ranks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.layout import RoleLayout
from imdm_scale.model.placement import Placement
from imdm_scale.model.weights import canonical_shapes, placements, stage_of
from imdm_scale.parallel import compat
from imdm_scale.parallel.layout import RoleGroups

if TYPE_CHECKING:
    from imdm_scale.parallel.engine import Student

WholeTensors = Iterable[tuple[str, Tensor]]
"""Canonical names with their whole tensors."""


@torch.no_grad()
def write_shard(
    parameter: torch.nn.Parameter, placement: Placement, whole: Tensor, groups: RoleGroups
) -> None:
    """Write this rank's part of a whole tensor: its tensor-parallel shard, and of that its ZeRO-3 partition."""
    shard = placement.to_shard(whole, groups.tp_rank, groups.tp_size)
    partition = compat.partition_of(parameter)
    if partition is None:
        parameter.copy_(shard)
        return
    mine = shard.flatten().split(partition.numel())[groups.dp_rank :][:1]
    for part in mine:  # none where the padding reaches over whole ranks
        partition[: part.numel()].copy_(part)


def whole_weights(
    student: Student | None,
    layout: RoleLayout,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    receivers: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The student's weights, whole, on every rank of `receivers`, one after the other in file order.

    Collective: all iterate together. At no time is more than one tensor whole.

    Args:
        student: None on ranks that have no part in it.
        layout: the student's.
        dtype: of the student's parameters.
        device: this rank's.
        receivers: at least the student's ranks; None is all ranks of the run.
    """
    own = {}
    if student is not None:
        own = {
            placement.name: (parameter, placement)
            for stage in student.stages
            for parameter, placement in placements(stage)
        }
    for name, shape in canonical_shapes(architecture).items():
        source = layout.rank_at(stage_of(name, architecture, layout.pp, layout.virtual_stages), dp=0, tp=0)
        whole = None
        if student is not None and name in own:
            whole = _gather(*own[name], student.groups)
        if dist.get_rank() != source:
            whole = torch.empty(shape, dtype=dtype, device=device)
        assert whole is not None, "the source holds the tensor"
        whole = whole.to(device).contiguous()
        dist.broadcast(whole, src=source, group=receivers)
        yield name, whole


def _gather(parameter: torch.nn.Parameter, placement: Placement, groups: RoleGroups) -> Tensor:
    """The whole tensor, on every rank that holds a part of it."""
    with deepspeed.zero.GatheredParameters([parameter]):
        shard = parameter.detach().clone()
    shards = [shard]
    if placement.shard_dim is not None and groups.tp_size > 1:
        shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=groups.collection.tp)
    return placement.to_whole(shards)
