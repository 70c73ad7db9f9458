"""How much memory a rank takes: ZeRO-3 over 4 ranks against ZeRO-0, for a network of 110 million parameters.

Measured is the growth of a rank's resident memory from before the network exists to its highest point.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.deepspeed_json import resolve_ds_config
from imdm_scale.config.layout import run_layout
from imdm_scale.model.weights import canonical_shapes
from imdm_scale.parallel.engine import Student
from imdm_scale.parallel.layout import build_groups
from imdm_scale.parallel.network import build_module
from imdm_scale.parallel.schedule import NetworkInput
from tests.distributed.pool import RankPool
from tests.distributed.small_run import small_config

WORLD_SIZE = 4
NETWORK = Architecture(
    vocab_size=64, mask_token_id=63, length=8, hidden_size=1024, num_layers=8, num_heads=8, noise_dim=8
)
WHOLE_BYTES = 4 * NETWORK.num_parameters()
BUFFERS = {
    "reduce_bucket_size": 2_000_000,
    "stage3_prefetch_bucket_size": 2_000_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 10_000_000,
    "sub_group_size": 10_000_000,
}
"""Elements. DeepSpeed's defaults are for networks a hundred times as large; they would hold this one whole."""


@dataclass
class Growth:
    """Bytes of resident memory that came on top of what a rank had before."""

    building: int
    """At the highest point while the network was built."""
    training: int
    """At the highest point of all, after two updates."""


def resident(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its highest since `forget_peak`) in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """The highest resident memory is from now on counted anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def return_what_is_freed() -> None:
    """Let freed tensors leave the process at once, so that resident memory is what is in use.

    glibc would keep blocks of up to 32 MiB, as large as a weight here, for later: then what is measured is the order
    in which buffers came and went. To set the threshold stops its growth (mallopt(3), M_MMAP_THRESHOLD).
    """
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 64 * 1024) == 1


def growth_of_two_updates(stage: int) -> Growth:
    """This rank's, by the product's engine; the weights are written one tensor at a time."""
    config = small_config(global_batch_size=WORLD_SIZE, micro_batch_size=1)
    ds_json: dict[str, Any] = {"zero_optimization": {"stage": stage, **BUFFERS}}
    ds_config = resolve_ds_config(ds_json, config, WORLD_SIZE, Path("zero.json"))
    groups = build_groups(run_layout(config, WORLD_SIZE, stage)).student
    assert groups is not None
    shapes = canonical_shapes(NETWORK)
    return_what_is_freed()
    gc.collect()
    before = resident("VmRSS")
    forget_peak()
    module = build_module(
        NETWORK, groups, ds_config, torch.float32, lambda name: torch.full(shapes[name], 0.01)
    )
    building = resident("VmHWM") - before
    student = Student(module, groups, ds_config, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ids_BL = torch.full((1, NETWORK.length), NETWORK.mask_token_id)
    noise_BLD = torch.zeros(1, NETWORK.length, NETWORK.noise_dim)
    given = NetworkInput(ids_BL, lambda: noise_BLD, torch.arange(NETWORK.length))
    for _ in range(2):
        student.accumulate([given], lambda logits_NV, index: logits_NV.square().mean())
        student.step(1e-3)
    growth = Growth(building, resident("VmHWM") - before)
    dist.barrier()
    return growth


def test_a_rank_of_zero_3_takes_its_share(pool: RankPool) -> None:
    replicated, partitioned = (pool.run(growth_of_two_updates, WORLD_SIZE, stage=stage) for stage in (0, 3))
    print(
        f"\n{NETWORK.num_parameters() / 1e6:.0f} million parameters, {WHOLE_BYTES / 2**20:.0f} MiB; MiB a rank:",
        *(
            f"ZeRO-{stage}: building {max(rank.building for rank in ranks) / 2**20:.0f}, "
            f"training {max(rank.training for rank in ranks) / 2**20:.0f}"
            for stage, ranks in ((0, replicated), (3, partitioned))
        ),
        sep="\n",
    )
    # Weights, gradients and Adam's two moments.
    assert min(rank.training for rank in replicated) > 4 * WHOLE_BYTES
    assert max(rank.building for rank in partitioned) < WHOLE_BYTES
    for mine, whole in zip(partitioned, replicated, strict=True):
        assert mine.training < 0.4 * whole.training
