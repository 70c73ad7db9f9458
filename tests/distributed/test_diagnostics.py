"""What training measures of itself is the same for every layout, and what a plain computation gives.

Shapes: N masked positions, V vocabulary, E draws of the noise, P positions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from imdm_scale.config.tree import Config
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.distill.diagnostics import BINS
from tests.distributed.cases import first_update
from tests.distributed.layouts import Case, disaggregated, micro_batches, student, teacher
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_architecture, small_config, small_plan, zero
from tests.tiny import plain_network

WHAT = ("train.max_steps=1", "log.diagnose_every=1", "log.noise_draws=16")
CASES = [
    Case(("pretrain", *WHAT), student(2, 2) + micro_batches(2), 1),
    Case(("pretrain", *WHAT), student(1, 2) + micro_batches(1), 3),
    Case(("pretrain", *WHAT), student(1) + micro_batches(2), 0),
    Case(("pretrain", *WHAT), student(2) + micro_batches(4), 2),
    Case(
        ("coupled", "method.states=student", "method.visit_steps=2", *WHAT),
        student(2) + teacher(1, 2) + micro_batches(2, 4) + disaggregated(2),
        3,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_measures_do_not_depend_on_the_layout(pool: RankPool, case: Case) -> None:
    updates = pool.run(first_update, case.world_size, config=case.config, ds_json=zero(case.stage))
    seen = [updates[rank] for rank in case.layout.student.ranks]
    assert all(update.diagnostics == seen[0].diagnostics for update in seen)
    update = seen[0]
    norms = update.diagnostics["grad_norms"]
    assert set(norms) == {"token_embedding", "mask_embedding", "attention", "mlp", "norm", "head"}
    assert math.hypot(*norms.values()) == pytest.approx(update.grad_norm, rel=2e-6)
    assert update.clipped == 1, "the small run clips every update"
    if case.what[0] == "pretrain":
        assert update.network_evaluations == case.config.train.global_batch_size
        for name, value in plain_measures(case.config).items():
            assert update.diagnostics[name] == pytest.approx(value, rel=1e-5), name
    else:
        evaluations = 1 + case.config.method.trajectory_steps + 2
        assert update.network_evaluations == evaluations * case.config.train.global_batch_size
        assert update.visit_seconds > 0


def plain_measures(config: Config) -> dict[str, float | list[float | None]]:
    """The measures of the first update of a pretraining, by formulas over whole tensors in float64."""
    architecture = small_architecture(config)
    network = plain_network(architecture).double().eval()
    batch = small_plan(config).micro_batch(0, 0)
    with torch.no_grad():
        e_BLD = batch.mask_noise(architecture, torch.device("cpu")).double()
        log_p_NV = log_probabilities(network(batch.x_t_BL, mask_noise=e_BLD).logits)[batch.positions_N]
    picked_N = log_p_NV.gather(-1, batch.labels_N[:, None])[:, 0]
    losses_N = (-picked_N / batch.t_N).numpy()
    order_N = (1 - batch.reveal_N / batch.t_N).numpy()

    def by(part_N: np.ndarray) -> list[float | None]:
        bins = [losses_N[(part_N >= i / BINS) & (part_N < (i + 1) / BINS)] for i in range(BINS)]
        return [float(losses.mean()) if len(losses) else None for losses in bins]

    return {
        "loss_by_t": by(batch.t_N.numpy()),
        "loss_by_order": by(order_N),
        "student_entropy": -(log_p_NV.exp() * log_p_NV).sum(-1).mean().item(),
        "accuracy": (log_p_NV.argmax(-1) == batch.labels_N).double().mean().item(),
        "noise_information": plain_noise_information(config),
    }


def plain_noise_information(config: Config, scale: float = 1.0) -> float:
    """By the definition: the mean over e of KL(p(.|e) || mean over e of p(.|e)), at 4 of the 16 positions."""
    architecture = small_architecture(config)
    network = plain_network(architecture).double().eval()
    draws = config.log.noise_draws
    shape = draws, architecture.length
    e_ELD = mask_noise(
        config.seed, torch.arange(draws), 0, architecture.length, architecture.noise_dim
    ).double()
    with torch.no_grad():
        x_EL = torch.full(shape, architecture.mask_token_id)
        log_p_NV = log_probabilities(network(x_EL, mask_noise=scale * e_ELD).logits)
    log_p_EPV = log_p_NV.unflatten(0, shape)[:, [2, 6, 10, 14]]
    mean_PV = log_p_EPV.exp().mean(0)
    return (log_p_EPV.exp() * (log_p_EPV - mean_PV.clamp_min(1e-300).log())).sum(-1).mean().item()


def log_probabilities(logits_BLV: torch.Tensor) -> torch.Tensor:
    logits_NV = logits_BLV.flatten(0, 1)
    mask = torch.arange(logits_NV.shape[-1]) == logits_NV.shape[-1] - 1
    return logits_NV.masked_fill(mask, -1e6).log_softmax(-1)


def test_a_network_that_ignores_the_noise_shows_no_information() -> None:
    config = small_config("pretrain", *WHAT)
    assert plain_noise_information(config) > 0.1
    assert plain_noise_information(config, scale=0.0) == pytest.approx(0, abs=1e-12)
