"""The Megatron-core network is the plain torch one: same weights, same logits, same gradients.

Shapes: B batch, L positions, D noise dimensions, N positions with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from imdm_scale.model.stage import ImdmStage
from imdm_scale.model.weights import canonical_shapes, placements
from tests.tiny import plain_network, random_input, tiny, weights_of

TOLERANCE = 1e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "imdm": {},
    "mdm": {"noise_dim": 0},
    "fourier": {"noise_fourier": 3},
    "fourier_of_normal_noise": {"noise_fourier": 2, "noise_kind": "normal", "noise_scale": 0.7},
    "finite_masks": {"noise_dim": 1, "num_masks": 5},
    "qk_norm": {"qk_norm": True},
    "softcap": {"attention_softcap": 2.0},
    "other_base_and_eps": {"rope_base": 500.0, "layer_norm_eps": 1e-2},
    "rmsnorm": {"norm": "rmsnorm", "layer_norm_eps": 1e-2, "qk_norm": True},
    "swiglu": {"mlp": "swiglu", "mlp_size": 56},
    "no_biases": {"bias": False, "qk_norm": True},
    "narrow_mlp": {"mlp_size": 40},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "mlp_size": 96, "bias": False, "rope_base": 5e5},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@variants
def test_logits_and_gradients(build_stage: Callable[..., ImdmStage], changes: dict[str, Any]) -> None:
    architecture = tiny(**changes)
    plain = plain_network(architecture).eval()
    stage = build_stage(architecture, weights_of(plain))
    ids_BL, noise_BLD = random_input(architecture)
    generator = torch.Generator().manual_seed(2)
    positions_N = torch.randperm(ids_BL.numel(), generator=generator)[:20]
    weight_NV = torch.randn(20, architecture.vocab_size, generator=generator) / 20

    logits_NV = stage(ids_BL, noise_BLD, positions_N)
    expected_NV = plain(ids_BL, mask_noise=noise_BLD).logits.flatten(0, 1)[positions_N]
    assert (logits_NV - expected_NV).abs().max() < TOLERANCE

    (logits_NV * weight_NV).sum().backward()
    (expected_NV * weight_NV).sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for parameter, placement in placements(stage):
        gradient = placement.to_whole([parameter.grad])
        assert expected[placement.name].abs().max() > 1e-3, placement.name
        assert (gradient - expected.pop(placement.name)).abs().max() < TOLERANCE, placement.name
    assert not expected


@pytest.mark.parametrize(
    ("changes", "least_effect"),
    [
        ({"qk_norm": True}, 0.1),
        ({"attention_softcap": 2.0}, 0.01),
        ({"rope_base": 500.0}, 0.01),
        ({"norm": "rmsnorm"}, 0.1),
        ({"bias": False}, 0.1),
    ],
)
def test_the_variants_differ(
    build_stage: Callable[..., ImdmStage], changes: dict[str, Any], least_effect: float
) -> None:
    ids_BL, noise_BLD = random_input(tiny())
    positions_N = torch.arange(ids_BL.numel())
    weights = weights_of(plain_network(tiny(qk_norm=True)))
    usual_NV = build_stage(tiny(), weights)(ids_BL, noise_BLD, positions_N)
    other_NV = build_stage(tiny(**changes), weights)(ids_BL, noise_BLD, positions_N)
    assert (usual_NV - other_NV).abs().max() > least_effect


@variants
def test_every_weight_has_one_place(build_stage: Callable[..., ImdmStage], changes: dict[str, Any]) -> None:
    architecture = tiny(**changes)
    plain = plain_network(architecture)
    stage = build_stage(architecture, weights_of(plain))
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert canonical_shapes(architecture) == shapes
    wholes = [(placement.name, placement.to_whole([parameter])) for parameter, placement in placements(stage)]
    assert len(wholes) == len(shapes)
    assert {name: tuple(whole.shape) for name, whole in wholes} == shapes
    assert all(torch.equal(whole, plain.state_dict()[name]) for name, whole in wholes)
    assert not list(stage.buffers())


def test_a_fresh_imdm_is_the_mdm_bit_for_bit(build_stage: Callable[..., ImdmStage]) -> None:
    ids_BL, noise_BLD = random_input(tiny())
    positions_N = torch.arange(ids_BL.numel())
    weights = weights_of(plain_network(tiny()))
    mdm_NV = build_stage(tiny(noise_dim=0), weights)(ids_BL, noise_BLD, positions_N)
    assert not torch.equal(build_stage(tiny(), weights)(ids_BL, noise_BLD, positions_N), mdm_NV)
    weights["mask_embedding.dense_out.weight"].zero_()
    assert torch.equal(build_stage(tiny(), weights)(ids_BL, noise_BLD, positions_N), mdm_NV)


def test_features_with_zero_weights_change_nothing_bit_for_bit(build_stage: Callable[..., ImdmStage]) -> None:
    ids_BL, noise_BLD = random_input(tiny())
    positions_N = torch.arange(ids_BL.numel())
    weights = weights_of(plain_network(tiny(noise_fourier=5)))
    without_NV = build_stage(tiny(), weights)(ids_BL, noise_BLD, positions_N)
    assert not torch.equal(
        build_stage(tiny(noise_fourier=5), weights)(ids_BL, noise_BLD, positions_N), without_NV
    )
    weights["mask_embedding.dense_fourier.weight"].zero_()
    assert torch.equal(
        build_stage(tiny(noise_fourier=5), weights)(ids_BL, noise_BLD, positions_N), without_NV
    )


def test_features_are_those_of_the_noise_before_it_is_rounded(build_stage: Callable[..., ImdmStage]) -> None:
    """Noise that bfloat16 cannot tell apart still gives a bfloat16 network different features."""
    architecture = tiny(noise_fourier=64)
    weights = weights_of(plain_network(architecture))
    stage = build_stage(architecture, weights, dtype=torch.bfloat16)
    plain = plain_network(architecture).bfloat16()
    noise_ND = torch.full((2, architecture.noise_dim), 0.75)
    noise_ND[1, 0] += 2**-10
    assert torch.equal(noise_ND[0].bfloat16(), noise_ND[1].bfloat16())
    for embedding in (stage.embedding.mask_embedding, plain.mask_embedding):
        g_NH = embedding(noise_ND)
        assert g_NH.dtype == torch.bfloat16
        assert (g_NH[0] - g_NH[1]).abs().max() > 0.1


def test_the_noise_of_unmasked_positions_is_not_read(build_stage: Callable[..., ImdmStage]) -> None:
    architecture = tiny()
    stage = build_stage(architecture, weights_of(plain_network(architecture)))
    ids_BL, noise_BLD = random_input(architecture)
    positions_N = torch.arange(ids_BL.numel())
    masked_BL1 = (ids_BL == architecture.mask_token_id)[..., None]
    elsewhere_BLD = noise_BLD.where(masked_BL1, float("nan"))
    assert torch.equal(stage(ids_BL, elsewhere_BLD, positions_N), stage(ids_BL, noise_BLD, positions_N))


def test_nothing_masked_and_nothing_asked(build_stage: Callable[..., ImdmStage]) -> None:
    architecture = tiny()
    stage = build_stage(architecture, weights_of(plain_network(architecture)))
    ids_BL, noise_BLD = random_input(architecture)
    nowhere_N = torch.empty(0, dtype=torch.int64)
    logits_NV = stage(ids_BL.clamp(max=5), noise_BLD, nowhere_N)
    assert logits_NV.shape == (0, architecture.vocab_size)
