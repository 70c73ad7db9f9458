"""This rank's part of a network, as one module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.decoder import Recompute
from imdm_scale.model.stage import ImdmStage
from imdm_scale.model.weights import placements
from imdm_scale.parallel.layout import RoleGroups
from imdm_scale.parallel.shards import write_shard


class StageChunks(nn.Module):
    """The stages that one pipeline rank holds (more than one where stages are interleaved), as one engine's module."""

    def __init__(self, stages: Sequence[ImdmStage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, chunk: int, *inputs: Any) -> Tensor:
        """The output of stage number `chunk` of this rank."""
        return self.stages[chunk](*inputs)


def build_module(
    architecture: Architecture,
    groups: RoleGroups,
    ds_config: dict[str, Any],
    dtype: torch.dtype,
    whole_tensor: Callable[[str], Tensor] | None,
    *,
    recompute: Recompute = "none",
    has_head: bool = True,
) -> StageChunks:
    """This rank's part of a network.

    Under ZeRO-3 every parameter is partitioned as soon as it is made, so no rank ever holds more of the network
    than one layer beside its own partitions.

    Args:
        ds_config: the engine's.
        whole_tensor: canonical name -> float tensor, called for this rank's tensors only; None leaves the weights
            as they are.
    """
    partitioned = contextlib.nullcontext()
    if groups.layout.zero_stage == 3:
        # The precision comes with the configuration: given as `dtype`, float32 would become bfloat16
        # (zero/partition_parameters.py:409).
        partitioned = deepspeed.zero.Init(
            data_parallel_group=groups.mpu.dp, config_dict_or_path=ds_config, mpu=groups.mpu
        )
    with partitioned:
        virtual_stages = groups.layout.virtual_stages
        module = StageChunks(
            [
                ImdmStage(
                    architecture,
                    groups.collection,
                    dtype,
                    sequence_parallel=groups.layout.sequence_parallel,
                    recompute=recompute,
                    has_head=has_head,
                    virtual_stage=index,
                    virtual_stages=virtual_stages,
                )
                for index in range(virtual_stages)
            ]
        )
    if whole_tensor is not None:
        for stage in module.stages:
            for parameter, placement in placements(stage):
                write_shard(parameter, placement, whole_tensor(placement.name), groups)
    return module
