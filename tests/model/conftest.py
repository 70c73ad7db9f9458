"""Megatron-core networks in this process, and worlds of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.stage import ImdmStage
from imdm_scale.parallel.layout import RoleGroups
from tests.distributed.pool import RankPool
from tests.model.ranks import load, role_groups

BuildStage = Callable[..., ImdmStage]


@pytest.fixture(scope="session")
def groups(world_of_one: None) -> RoleGroups:
    """The groups of a network that one process holds."""
    return role_groups()


@pytest.fixture
def build_stage(groups: RoleGroups) -> BuildStage:
    """Factory of the Megatron-core network with given weights, in evaluation mode."""

    def build(architecture: Architecture, weights: Mapping[str, Tensor], **options: Any) -> ImdmStage:
        stage = ImdmStage(architecture, groups.collection, **options)
        load(stage, weights, groups)
        return stage.eval()

    return build


@pytest.fixture(scope="session")
def pool() -> RankPool:
    """Runs a function on a world of processes: `results = pool.run(case, world_size=2, ...)`."""
    return RankPool()
