"""Every touch of a library's private names, in one place, each with the reason and the upstream line.

Written for DeepSpeed 0.19 and Megatron-core 0.16; another version is refused before it can go wrong silently.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.errors import UserError

KNOWN_VERSIONS = {"deepspeed": "0.19.", "megatron-core": "0.16."}


def check_versions() -> None:
    """Refuse library versions whose private names this file was not written for.

    Raises:
        UserError: with the package, its version and the version to install.
    """
    for package, known in KNOWN_VERSIONS.items():
        found = version(package)
        if not found.startswith(known):
            raise UserError(
                f"{package} {found} is installed, but imdm_scale's compatibility layer is written for "
                f"{known}x; install it with: pip install -c constraints.txt -e ."
            )


def prepare_libraries() -> None:
    """Make Megatron-core and DeepSpeed run on a machine without CUDA; does nothing where CUDA is present."""
    check_versions()
    # Said by Megatron-core at every import, of parts that this project does not use.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    if torch.cuda.is_available():
        return
    # Megatron-core asks for the current CUDA device even for tensors that are built on the CPU
    # (core/utils.py:631, rotary_pos_embedding.py:162, tensor_parallel/mappings.py:91,181).
    torch.cuda.current_device = lambda: torch.device("cpu")
    # DeepSpeed would compile a shared-memory all-reduce for two minutes at its first use (comm/torch.py:47).
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def default_store() -> dist.Store:
    """The key-value store by which the ranks of the default process group met."""
    return dist.distributed_c10d._get_default_store()


def set_deepspeed_mpu(mpu: object) -> None:
    """Name the model-parallel unit that DeepSpeed's group helpers answer for.

    It is one global (deepspeed/utils/groups.py) which every `deepspeed.initialize` overwrites, so with two
    engines in a process it must be set again around each engine's use.
    """
    import deepspeed.utils.groups

    deepspeed.utils.groups.mpu = mpu


def master_shards(engine: object) -> list[Tensor]:
    """The flat fp32 master weights that this rank owns under ZeRO-1, 2 or 3 (views: writing changes them).

    stage3.py: fp32_partitioned_groups_flat; stage_1_and_2.py: single_partition_of_fp32_groups.
    """
    optimizer = engine.optimizer  # type: ignore[attr-defined]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [shard.data for shard in optimizer.fp32_partitioned_groups_flat]
    return [shard.data for shard in optimizer.single_partition_of_fp32_groups]


def publish_master_shards(engine: object) -> None:
    """Bring the working weights up to date with the master shards, as the end of an optimizer step does.

    stage3.py:2854 (copy and unflatten a sub-group) and :2840 (gather the small, persistent parameters again);
    stage_1_and_2.py:3172.
    """
    optimizer = engine.optimizer  # type: ignore[attr-defined]
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def partition_of(parameter: torch.nn.Parameter) -> Tensor | None:
    """This rank's flat partition of a ZeRO-3 parameter, or None where the parameter is not partitioned.

    partition_parameters.py attaches it as `ds_tensor`, padded so that all ranks hold equally many elements.
    """
    partition = getattr(parameter, "ds_tensor", None)
    return None if partition is None else partition.data
