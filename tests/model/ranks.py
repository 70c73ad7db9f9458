"""Networks over the ranks of a world, taken forwards and backwards by hand.

Shapes: B batch, L positions, S those of them that a rank holds between layers, N selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.layout import RoleLayout, RunLayout
from imdm_scale.model.layer import DropoutKey
from imdm_scale.model.placement import Placement
from imdm_scale.model.stage import ImdmStage
from imdm_scale.model.weights import placements
from imdm_scale.parallel.layout import RoleGroups, build_groups
from tests.tiny import plain_network, random_input, weights_of

NUM_POSITIONS = 20


def role_groups(tp: int = 1, pp: int = 1) -> RoleGroups:
    """Groups of one network over the whole world; what is left of the world are replicas."""
    ranks = tuple(range(dist.get_world_size()))
    layout = RoleLayout("student", ranks, tp, pp, sequence_parallel=False, zero_stage=0, micro_batch_size=1)
    groups = build_groups(RunLayout(len(ranks), "colocated", layout, None)).student
    assert groups is not None
    return groups


@torch.no_grad()
def load(stage: ImdmStage, weights: Mapping[str, Tensor], groups: RoleGroups) -> None:
    """Fill a stage from whole tensors."""
    for parameter, placement in placements(stage):
        parameter.copy_(placement.to_shard(weights[placement.name], groups.tp_rank, groups.tp_size))


def build_stages(
    architecture: Architecture, groups: RoleGroups, virtual_stages: int = 1, **options: Any
) -> list[ImdmStage]:
    """This rank's stages of the network that has `plain_network`'s weights, in training mode."""
    stages = []
    for index in range(virtual_stages):
        stage = ImdmStage(
            architecture, groups.collection, virtual_stage=index, virtual_stages=virtual_stages, **options
        )
        load(stage, weights_of(plain_network(architecture)), groups)
        stages.append(stage)
    return stages


def logits_and_gradients(stages: Sequence[ImdmStage], groups: RoleGroups) -> dict[str, Tensor]:
    """What this rank has of the logits of some positions and of the gradients of a function of them.

    Returns:
        Canonical name -> whole gradient, and on the last stage "logits" -> (N, V) over the whole vocabulary.
    """
    architecture, pp, me = stages[0].architecture, groups.pp_size, groups.pp_rank
    ids_BL, noise_BLD = random_input(architecture)
    positions_N = torch.randperm(ids_BL.numel(), generator=torch.Generator().manual_seed(2))[:NUM_POSITIONS]
    key = DropoutKey(1, 3, torch.tensor([5, 2**40, 9]))
    length = ids_BL.size(1) // (groups.tp_size if stages[0].config.sequence_parallel else 1)
    between_stages = (length, len(ids_BL), architecture.hidden_size)

    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    hidden_SBH = torch.empty(0)
    for number in range(pp * len(stages)):
        if number % pp == me:
            stage = stages[number // pp]
            if number > 0:
                inputs[number] = hidden_SBH.requires_grad_()
                stage.set_input_tensor([inputs[number]])
            # A stage is given only what it needs.
            outputs[number] = stage(
                *((ids_BL, noise_BLD) if stage.is_first else (None, None)),
                positions_N if stage.is_last else None,
                key,
            )
        if number + 1 < pp * len(stages):
            hidden_SBH = _from_stage(number % pp, outputs.get(number), between_stages, groups)

    result = {}
    gradient = torch.empty(0)
    for number in reversed(range(pp * len(stages))):
        if number + 1 < pp * len(stages):
            received = inputs.get(number + 1)
            found = None if received is None else received.grad
            gradient = _from_stage((number + 1) % pp, found, between_stages, groups)
        elif number % pp == me:
            of_logits = Placement("head.weight", 1)
            result["logits"] = _whole(outputs[number].detach(), of_logits, groups)[
                :, : architecture.vocab_size
            ]
            gradient = _weight_of_logits(outputs[number], groups)
        if number % pp == me:
            outputs[number].backward(gradient)
    for stage in stages:
        for parameter, placement in placements(stage):
            assert parameter.grad is not None
            result[placement.name] = _whole(parameter.grad, placement, groups)
    return result


def _weight_of_logits(logits_NV: Tensor, groups: RoleGroups) -> Tensor:
    """This rank's part of a fixed random weight of every logit, padding included."""
    generator = torch.Generator().manual_seed(3)
    width = logits_NV.size(1)
    weight_VN = torch.randn(4096, NUM_POSITIONS, generator=generator) / NUM_POSITIONS
    return weight_VN[groups.tp_rank * width :][:width].t()


def _from_stage(stage: int, x: Tensor | None, shape: tuple[int, ...], groups: RoleGroups) -> Tensor:
    """A tensor that one pipeline rank has, on all of them."""
    x = torch.empty(shape) if groups.pp_rank != stage or x is None else x.detach().clone()
    group = groups.collection.pp
    dist.broadcast(x, src=dist.get_global_rank(group, stage), group=group)
    return x


def _whole(shard: Tensor, placement: Placement, groups: RoleGroups) -> Tensor:
    """The tensor of which every tensor-parallel rank has a shard, or a copy of its own."""
    if placement.shard_dim is None:
        return shard
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(groups.tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=groups.collection.tp)
    return placement.to_whole(shards)
