"""The laws of the initial weights. All draws are seeded, so a test that passes once passes always.

Kolmogorov and Smirnov's test is asked for a p-value above 1e-3: a right law fails that with this chance, once.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.hf.export import config_from_architecture
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from imdm_scale.model.weights import canonical_shapes, initial_weight
from tests.tiny import tiny

ARCHITECTURE = tiny(hidden_size=64, noise_dim=48, initializer_range=0.03, qk_norm=True)
LLAMA = replace(ARCHITECTURE, norm="rmsnorm", mlp="swiglu", mlp_size=96, bias=False)
SHAPES = canonical_shapes(ARCHITECTURE)


def drawn(name: str, seed: int = 1, architecture: Architecture = ARCHITECTURE) -> Tensor:
    shape = canonical_shapes(architecture)[name]
    weight = initial_weight(name, shape, architecture, seed)
    assert weight.dtype == torch.float32 and tuple(weight.shape) == shape
    return weight


LAWS = {
    "blocks.0.attention.qkv.weight": stats.norm(scale=0.03),
    "blocks.1.attention.out.weight": stats.norm(scale=0.03),
    "blocks.0.mlp.dense_in.weight": stats.norm(scale=0.03),
    "blocks.1.mlp.dense_out.weight": stats.norm(scale=0.03),
    "token_embedding.weight": stats.uniform(-1 / 8, 2 / 8),
    "mask_embedding.dense_in.weight": stats.truncnorm(-2, 2, scale=0.02),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws(name: str) -> None:
    values, law = drawn(name).flatten().double().numpy(), LAWS[name]
    assert stats.kstest(values, law.cdf).pvalue > 1e-3
    # Five standard errors: a right law is farther off with a chance of 6e-7.
    assert abs(values.mean()) < 5 * law.std() / math.sqrt(values.size)
    fourth_moment = law.stats(moments="k") + 3
    assert abs(values.var() / law.var() - 1) < 5 * math.sqrt((fourth_moment - 1) / values.size)


def test_cut_and_bounded() -> None:
    assert drawn("mask_embedding.dense_in.weight").abs().max() <= 0.04
    assert drawn("token_embedding.weight").abs().max() <= 1 / 8


def test_the_rest_is_zero_or_one() -> None:
    for name in SHAPES.keys() - LAWS.keys():
        if "blocks" in name and not name.endswith("bias") and "norm" not in name:
            continue  # the other layer's linears, whose law is tested above
        value = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        assert (drawn(name) == value).all(), name


def test_a_weight_is_a_function_of_seed_and_name() -> None:
    name, other = "blocks.0.attention.out.weight", "blocks.1.attention.out.weight"
    assert torch.equal(drawn(name), drawn(name))
    for different in (drawn(other), drawn(name, seed=2)):
        assert abs(torch.corrcoef(torch.stack([drawn(name).flatten(), different.flatten()]))[0, 1]) < 5 / 64


@pytest.mark.parametrize("architecture", [ARCHITECTURE, LLAMA], ids=["mdlm", "llama"])
def test_the_plain_network_starts_by_the_same_laws(architecture: Architecture) -> None:
    torch.manual_seed(0)
    plain = ImdmForMaskedLM(config_from_architecture(architecture)).state_dict()
    for name, weight in plain.items():
        ours = drawn(name, architecture=architecture)
        if ours.std() == 0:
            assert torch.equal(weight, ours), name
        else:
            assert weight.std().item() == pytest.approx(ours.std().item(), rel=0.05), name
            assert weight.abs().max().item() == pytest.approx(ours.abs().max().item(), rel=0.25), name
