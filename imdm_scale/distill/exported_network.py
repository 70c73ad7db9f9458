"""An exported model as a network over all ranks, under any layout, to be evaluated.

V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.checkpoint.weights import folder_weights
from imdm_scale.config.layout import RoleLayout, RunLayout
from imdm_scale.distill.build import build_teacher
from imdm_scale.errors import UserError
from imdm_scale.evaluate.exported import ExportedModel
from imdm_scale.hf.export import DTYPES, RANKS
from imdm_scale.hf.weight_files import open_weights
from imdm_scale.parallel.engine import Teacher
from imdm_scale.parallel.layout import build_groups


@dataclass(frozen=True)
class Sharing:
    """How the ranks share the network; what remains of them is data parallel."""

    tp: int
    pp: int
    zero_stage: int
    """0 or 3: the other stages partition nothing that a frozen network has."""
    batch_size: int
    """Texts that a replica passes through the network at a time."""


def check_sharing(sharing: Sharing, model: ExportedModel, world_size: int) -> None:
    """Raises UserError where the model, or the number of processes, cannot be shared so."""
    shape, tp, pp = model.architecture, sharing.tp, sharing.pp
    for flag, parts, whole, what in (
        ("--tp", tp, shape.num_heads, "attention heads"),
        ("--tp", tp, shape.mlp_size, "columns of the MLPs"),
        ("--pp", pp, shape.num_layers, "layers"),
    ):
        if whole % parts:
            allowed = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise UserError(
                f"{flag} is {parts}, which does not divide the {whole} {what} of {model.folder}; give one of {allowed}."
            )
    if world_size % (tp * pp):
        raise UserError(
            f"--tp x --pp is {tp} x {pp} = {tp * pp}, which does not divide the {world_size} "
            f"process{'es' * (world_size > 1)}; start {-(-world_size // (tp * pp)) * tp * pp}, with "
            "deepspeed --num_gpus."
        )


def load_network(model: ExportedModel, sharing: Sharing, dtype: str) -> tuple[Teacher, Tensor | None]:
    """The network in evaluation mode, and its order of the tokens (ranks (V,), None for that of ids). Collective.

    Args:
        dtype: fp32 or bf16.

    Raises:
        UserError: the weights cannot be read, or are not the configured network's.
    """
    world = tuple(range(dist.get_world_size()))
    role = RoleLayout(
        role="model",
        ranks=world,
        tp=sharing.tp,
        pp=sharing.pp,
        sequence_parallel=False,
        zero_stage=sharing.zero_stage,
        micro_batch_size=sharing.batch_size,
    )
    groups = build_groups(RunLayout(len(world), "colocated", role, None)).student
    assert groups is not None, "every rank has a part"
    ds_config = {
        "train_micro_batch_size_per_gpu": sharing.batch_size,
        "zero_optimization": {"stage": sharing.zero_stage},
        "bf16": {"enabled": dtype == "bf16"},
    }
    weights = folder_weights(model.folder, model.architecture, seed=0)
    network = build_teacher(ds_config, groups, model.architecture, DTYPES[dtype], weights)
    return network, _ranks(model)


def _ranks(model: ExportedModel) -> Tensor | None:
    files = open_weights(model.folder)
    return files.tensor(RANKS).to(torch.int64) if RANKS in files.shapes else None
