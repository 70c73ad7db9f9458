"""1,024 ranks without their machines: the groups, and which rank owns which part of which parameter.

torch's fake process group lets one process be any rank; on the meta device weights have shapes but no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from imdm_scale.config.architecture import SIZES, Architecture
from imdm_scale.config.layout import RoleLayout, RunLayout, run_layout
from imdm_scale.config.tree import Config
from imdm_scale.model.head import FrozenHead
from imdm_scale.model.placement import Placement
from imdm_scale.model.weights import canonical_shapes, placements, stage_of
from imdm_scale.parallel.compat import prepare_libraries
from imdm_scale.parallel.layout import RoleGroups, build_groups
from imdm_scale.parallel.network import build_module
from tests.distributed.pool import RankPool

WORLD_SIZE = 1024
VOCAB_SIZE = 50258  # GPT-2's and the mask: no multiple of 4 or 8
META = torch.device("meta")

PARALLEL: dict[str, dict[str, Any]] = {
    "1b": {"student": {"tp": 2, "pp": 4}, "teacher": {"tp": 4, "pp": 1}},
    "7b": {"student": {"tp": 8, "pp": 4}, "teacher": {"tp": 8, "pp": 2}},
    "70b": {"student": {"tp": 8, "pp": 8, "virtual_stages": 2}, "teacher": {"tp": 8, "pp": 4}},
}


@dataclass
class Seen:
    """What one rank has of one role."""

    groups: dict[str, list[int]]
    """Global ranks of its groups."""
    ranks: dict[str, int]
    """Its rank within them."""
    owned: list[tuple[Placement, tuple[int, ...]]] = field(default_factory=list)
    """Its parameters and their shapes."""


def layout_of(size: str, placement: str) -> RunLayout:
    """A run of 1,024 ranks; a quarter of them are the teacher's where it has its own."""
    config = Config()
    config.method.name, config.model.size = "im_sdtt", size
    config.teacher.placement = placement  # type: ignore[assignment]
    config.teacher.ranks = WORLD_SIZE // 4 if placement == "disaggregated" else None
    for role, settings in PARALLEL[size].items():
        for name, value in settings.items():
            setattr(getattr(config.parallel, role), name, value)
    return run_layout(config, WORLD_SIZE, zero_stage=1)


def architecture(size: str) -> Architecture:
    return Architecture(vocab_size=VOCAB_SIZE, mask_token_id=VOCAB_SIZE - 1, length=1024, **SIZES[size])


def replica_ranks(role: RoleLayout, dp: int) -> list[int]:
    """Ranks of one replica."""
    return [role.rank_at(pp, dp, tp) for pp in range(role.pp) for tp in range(role.tp)]


def see(size: str, placement: str, ranks: list[int]) -> dict[int, dict[str, Seen | None]]:
    """What each of `ranks` makes of the run, by the product's own code."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    prepare_libraries()
    layout, shape = layout_of(size, placement), architecture(size)
    seen: dict[int, dict[str, Seen | None]] = {}
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
        groups = build_groups(layout)
        seen[rank] = {"student": _seen(groups.student, shape), "teacher": _seen(groups.teacher, shape)}
        assert dist.get_process_group_ranks(groups.hand_over) == [*range(WORLD_SIZE)]
        dist.destroy_process_group()
    return seen


def _seen(groups: RoleGroups | None, shape: Architecture) -> Seen | None:
    if groups is None:
        return None
    collection = groups.collection
    named = {name: getattr(collection, name) for name in ("tp", "dp", "pp", "mp", "cp")}
    named["everyone"] = groups.everyone
    seen = Seen(
        {name: dist.get_process_group_ranks(group) for name, group in named.items()},
        {name: group.rank() for name, group in named.items()},
    )
    is_student = groups.layout.role == "student"
    with META:
        module = build_module(shape, groups, {}, torch.bfloat16, None, has_head=is_student)
    for stage in module.stages:
        seen.owned += [(placement, tuple(weight.shape)) for weight, placement in placements(stage)]
    if not is_student and groups.is_last_stage:
        head = FrozenHead(shape, collection, torch.bfloat16, META)
        for name, weight in head.named_parameters():
            placement = Placement(f"head.{name}", shard_dim=0, vocab_size=VOCAB_SIZE)
            seen.owned.append((placement, tuple(weight.shape)))
    return seen


def check_groups(seen: Seen, role: RoleLayout, rank: int) -> None:
    """Tensor-parallel ranks are innermost and pipeline stages outermost in the role's list of ranks."""
    grid = np.array(role.ranks).reshape(role.pp, role.dp, role.tp)
    pp, dp, tp = (int(where[0]) for where in np.nonzero(grid == rank))
    assert seen.groups == {
        "tp": grid[pp, dp, :].tolist(),
        "dp": grid[pp, :, tp].tolist(),
        "pp": grid[:, dp, tp].tolist(),
        "mp": grid[:, dp, :].flatten().tolist(),
        "cp": [rank],
        "everyone": grid.flatten().tolist(),
    }
    assert seen.ranks == {
        "tp": tp,
        "dp": dp,
        "pp": pp,
        "mp": pp * role.tp + tp,
        "cp": 0,
        "everyone": role.ranks.index(rank),
    }


def check_ownership(replica: list[Seen], role: RoleLayout, shape: Architecture) -> None:
    """Every element of every tensor is on one stage, once over its shards or once on each."""
    padded_rows = -(-VOCAB_SIZE // role.tp) * role.tp
    owned_by_place = [{placement.name: (placement, own) for placement, own in seen.owned} for seen in replica]
    assert [len(owned) for owned in owned_by_place] == [len(seen.owned) for seen in replica]
    copies = padding = 0
    for name, whole in canonical_shapes(shape).items():
        stage = stage_of(name, shape, role.pp, role.virtual_stages)
        holders = [place for place, owned in enumerate(owned_by_place) if name in owned]
        assert holders == [stage * role.tp + tp for tp in range(role.tp)], name
        placement = owned_by_place[holders[0]][name][0]
        assert [owned_by_place[place][name][0] for place in holders] == [placement] * role.tp
        shapes = [owned_by_place[place][name][1] for place in holders]
        assert len({*shapes}) == 1
        if placement.shard_dim is None:
            assert shapes[0] == whole
            copies += (role.tp - 1) * int(np.prod(whole))
            continue
        dim = placement.shard_dim
        rows = padded_rows if placement.vocab_size else whole[dim]
        assert shapes[0] == (*whole[:dim], rows // role.tp, *whole[dim + 1 :])
        # The indices along the dimension that is cut, as the ranks come by them: each once, and padding.
        indices = torch.arange(1, whole[dim] + 1).view([-1 if i == dim else 1 for i in range(len(whole))])
        shards = [placement.to_shard(indices, tp, role.tp).flatten() for tp in range(role.tp)]
        assert {shard.numel() for shard in shards} == {rows // role.tp}
        extra = rows - whole[dim]
        assert torch.cat(shards).sort().values.tolist() == [0] * extra + [*range(1, whole[dim] + 1)]
        padding += extra * int(np.prod(whole)) // whole[dim]
    held = sum(int(np.prod(own)) for seen in replica for _, own in seen.owned)
    assert padding == (padded_rows - VOCAB_SIZE) * (2 * shape.hidden_size + 1)
    assert held - copies - padding == shape.num_parameters()


@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
@pytest.mark.parametrize("size", [*PARALLEL])
def test_every_parameter_is_owned_once_in_each_replica(size: str, placement: str) -> None:
    layout = layout_of(size, placement)
    assert layout.teacher is not None
    of_role = {role: replica_ranks(role, role.dp // 2) for role in layout.roles}
    ranks = sorted({0, WORLD_SIZE - 1}.union(*of_role.values()))
    # In a process of its own: the fake group would be everyone's default group.
    with RankPool().context.Pool(1) as process:
        seen = process.apply(see, (size, placement, ranks))
    for role in layout.roles:
        for rank in ranks:
            found = seen[rank][role.role]
            assert (found is not None) == (rank in role.ranks)
            if found is not None:
                check_groups(found, role, rank)
        replica = [found for rank in of_role[role] if (found := seen[rank][role.role]) is not None]
        check_ownership(replica, role, architecture(size))
