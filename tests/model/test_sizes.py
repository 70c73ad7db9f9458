"""The named sizes have the parameter counts that the documentation gives."""

from __future__ import annotations

import dataclasses

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


LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "mlp_size": 12288, "bias": False}
LLADA_8B = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, **LLAMA}


def test_parameters_of_llada_8b(groups: RoleGroups) -> None:
    """8.02 billion, as its authors say; a student has a mask embedding besides."""
    llada = Architecture(vocab_size=126464, mask_token_id=126336, length=4096, noise_dim=0, **LLADA_8B)
    assert llada.num_parameters() == 8_015_581_184
    student = dataclasses.replace(llada, noise_dim=2048, noise_fourier=16)
    for architecture in (llada, student):
        with torch.device("meta"):
            stage = ImdmStage(architecture, groups.collection)
        assert sum(parameter.numel() for parameter in stage.parameters()) == architecture.num_parameters()


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
