"""Megatron-core networks in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.stage import ImdmStage
from imdm_scale.model.weights import load_weights
from imdm_scale.parallel.layout import RoleLayout, build_layout
from tests.tiny import source

BuildStage = Callable[[Architecture, Mapping[str, Tensor]], ImdmStage]


@pytest.fixture(scope="session")
def layout(world_of_one: None) -> RoleLayout:
    """The groups of a network that one process holds."""
    return build_layout(1, 1)


@pytest.fixture
def build_stage(layout: RoleLayout) -> BuildStage:
    """Factory of the Megatron-core network with given weights, in evaluation mode."""

    def build(architecture: Architecture, weights: Mapping[str, Tensor]) -> ImdmStage:
        stage = ImdmStage(architecture, layout.collection)
        load_weights(stage, source(weights), tp_rank=0, tp_size=1)
        return stage.eval()

    return build
