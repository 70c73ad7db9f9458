"""The named sizes have the parameter counts that the documentation gives."""

from __future__ import annotations

import pytest
import torch

from imdm_scale.config.architecture import SIZES, Architecture, size_named
from imdm_scale.model.stage import ImdmStage
from imdm_scale.parallel.layout import RoleGroups

GPT2_WITH_MASK = 50258
COUNTS = {
    "tiny": (4097, 5_585_921),
    "small": (GPT2_WITH_MASK, 170_919_506),
    "large": (GPT2_WITH_MASK, 856_281_170),
    "1b": (GPT2_WITH_MASK, 1_447_875_666),
    "3b": (GPT2_WITH_MASK, 3_543_436_370),
    "7b": (GPT2_WITH_MASK, 6_956_082_258),
    "70b": (GPT2_WITH_MASK, 65_589_478_482),
}


def test_every_size_is_counted() -> None:
    assert COUNTS.keys() == SIZES.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(groups: RoleGroups, name: str) -> None:
    vocab_size, count = COUNTS[name]
    architecture = Architecture(
        vocab_size=vocab_size, mask_token_id=vocab_size - 1, length=1024, **size_named(name)
    )
    with torch.device("meta"):
        stage = ImdmStage(architecture, groups.collection)
    assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in stage.parameters()) == count
    assert architecture.num_parameters() == count
