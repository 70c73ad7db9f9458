"""Whole tensors leave a network that is spread over ranks in the order in which their file is written."""

from __future__ import annotations

import pytest

from imdm_scale.hf.export import config_from_architecture, weight_shapes
from imdm_scale.model.weights import canonical_shapes
from tests.tiny import tiny


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_dim": 0},
        {"noise_fourier": 3},
        {"noise_dim": 1, "num_masks": 5},
        {"qk_norm": True, "attention_softcap": 5.0},
        {"qk_norm": True, "noise_fourier": 2, "num_layers": 3},
    ],
    ids=str,
)
def test_the_canonical_order_is_the_plain_models(changes: dict) -> None:
    architecture = tiny(**changes)
    expected = weight_shapes(config_from_architecture(architecture))
    assert list(canonical_shapes(architecture).items()) == list(expected.items())
