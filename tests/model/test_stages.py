"""A network that is cut over ranks is the network of one rank: same logits, same gradients, same dropout.

The network of one rank is the plain torch one: see test_equals_plain.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.head import FrozenHead, head_names
from imdm_scale.model.weights import canonical_shapes, stage_of
from tests.distributed.pool import RankPool
from tests.model.ranks import build_stages, logits_and_gradients, role_groups
from tests.tiny import plain_network, random_input, tiny, weights_of

# Tensor parallelism adds up in another order. The largest deviation seen is 3.7e-6, of a norm of keys, whose gradient
# is a sum that mostly cancels; that of the logits is 7e-7.
RELATIVE_TOLERANCE = 1e-5
ARCHITECTURE = tiny(num_layers=4, dropout=0.3, qk_norm=True, noise_fourier=3)
LLAMA = tiny(
    num_layers=4,
    dropout=0.3,
    qk_norm=True,
    norm="rmsnorm",
    mlp="swiglu",
    mlp_size=56,
    bias=False,
    rope_base=5e5,
)
GATED_WITH_BIAS = tiny(num_layers=4, mlp="swiglu", mlp_size=40)
NETWORKS = {"mdlm": ARCHITECTURE, "llama": LLAMA, "gated_with_bias": GATED_WITH_BIAS}

Cut = dict[str, Any]
CUTS: dict[int, list[Cut]] = {
    2: [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "sequence_parallel": True, "recompute": "full"},
        {"tp": 2, "sequence_parallel": True, "recompute": "selective"},
        {"pp": 2},
        {"pp": 2, "virtual_stages": 2, "recompute": "full"},
    ],
    4: [
        {"tp": 4},
        {"tp": 4, "sequence_parallel": True},
        {"tp": 2, "pp": 2},
        {"tp": 2, "pp": 2, "sequence_parallel": True, "virtual_stages": 2},
    ],
}


def compare_with_one_rank(architecture: Architecture, cuts: list[Cut]) -> list[dict[str, float]]:
    """For every cut, the largest deviation of every tensor, relative to the largest element."""
    alone = role_groups()
    expected = logits_and_gradients(build_stages(architecture, alone), alone)
    results = []
    for cut in cuts:
        options = dict(cut)
        groups = role_groups(options.pop("tp", 1), options.pop("pp", 1))
        found = logits_and_gradients(build_stages(architecture, groups, **options), groups)
        for name in found.keys() - {"logits"}:
            stage = stage_of(name, architecture, groups.pp_size, options.get("virtual_stages", 1))
            assert stage == groups.pp_rank, name
        results.append(
            {
                name: ((tensor - expected[name]).abs().max() / expected[name].abs().max()).item()
                for name, tensor in found.items()
            }
        )
    return results


@pytest.mark.parametrize(
    ("network", "world_size"),
    [("mdlm", 2), ("mdlm", 4), ("llama", 2), ("llama", 4), ("gated_with_bias", 2)],
)
def test_logits_and_gradients(pool: RankPool, network: str, world_size: int) -> None:
    architecture = NETWORKS[network]
    ranks = pool.run(compare_with_one_rank, world_size, architecture=architecture, cuts=CUTS[world_size])
    for cut, *deviations in zip(CUTS[world_size], *ranks, strict=True):
        for deviation in deviations:
            assert max(deviation.values()) < RELATIVE_TOLERANCE, (cut, deviation)
            # A pipeline computes what one rank does, bit for bit.
            assert "tp" in cut or not any(deviation.values()), (cut, deviation)
        names = [name for deviation in deviations for name in deviation]
        assert set(names) == {"logits", *canonical_shapes(architecture)}
        # Each tensor is on one stage, and there on all tensor-parallel ranks and in all replicas.
        assert set(map(names.count, names)) == {world_size // cut.get("pp", 1)}, cut


def trunk_and_head(architecture: Architecture) -> list[bool]:
    """Whether the logits of a headless trunk and a frozen head are those of the whole network, bit for bit."""
    equal = []
    weights = weights_of(plain_network(architecture))
    ids_BL, noise_BLD = random_input(architecture)
    positions_N = torch.arange(0, ids_BL.numel(), 3)
    for tp, sequence_parallel in [(1, False), (2, False), (2, True)]:
        groups = role_groups(tp)
        with torch.no_grad():
            expected_NV, hidden_NH = (
                build_stages(architecture, groups, has_head=has_head, sequence_parallel=sequence_parallel)[
                    0
                ].eval()(ids_BL, noise_BLD, positions_N)
                for has_head in (True, False)
            )
        head = FrozenHead(architecture, groups.collection, torch.float32, torch.device("cpu"))
        for name in head_names(architecture):
            head.write(name, weights[name])
        logits_NV = head(hidden_NH)
        assert not logits_NV.requires_grad and hidden_NH.shape == (len(positions_N), architecture.hidden_size)
        assert head.vocabulary.first_id == groups.tp_rank * logits_NV.size(1)
        equal.append(torch.equal(logits_NV, expected_NV))
    return equal


@pytest.mark.parametrize("network", ["mdlm", "llama"])
def test_a_trunk_and_a_frozen_head_are_the_network(pool: RankPool, network: str) -> None:
    assert pool.run(trunk_and_head, world_size=2, architecture=NETWORKS[network]) == [[True] * 3] * 2
