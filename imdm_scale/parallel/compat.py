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
    # Said by torch 2.13 of the names by which DeepSpeed gathers and reduces, at every call.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
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


def tag_for_grad_norm(parameter: torch.nn.Parameter, is_sharded: bool) -> None:
    """Say whether tensor-parallel ranks hold different parts of a parameter or equal copies of it.

    DeepSpeed's gradient norm adds up the parts of the former and counts the latter once (runtime/utils.py:134,
    zero/stage3.py:2455, zero/stage_1_and_2.py:2682). Megatron-core sets the tag while it initialises a weight,
    which is left out here (tensor_parallel/layers.py:244,855,1178).
    """
    parameter.tensor_model_parallel = is_sharded


def master_shards(engine: object) -> list[Tensor]:
    """The flat fp32 master weights that this rank owns under ZeRO-1, 2 or 3 (views: writing changes them).

    stage3.py: fp32_partitioned_groups_flat; stage_1_and_2.py: single_partition_of_fp32_groups.
    """
    optimizer = engine.optimizer  # type: ignore[attr-defined]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [shard.data for shard in optimizer.fp32_partitioned_groups_flat]
    return [shard.data for shard in optimizer.single_partition_of_fp32_groups]


def release_whole_parameters(engine: object) -> None:
    """Keep the partitions of ZeRO-3's parameters only; does nothing where parameters are not partitioned.

    DeepSpeed leaves parameters whole after an evaluation, and those that a module returned (as Megatron-core's
    linears return their bias) in any case: parameter_offload.py:386, partitioned_param_coordinator.py:528.
    Partitions that were written meanwhile would not be seen.
    """
    engine.empty_partition_cache()  # type: ignore[attr-defined]


def publish_master_shards(engine: object) -> None:
    """Bring the working weights up to date with the master shards, as the end of an optimizer step does.

    stage3.py:2880 (release what is whole), :2854 (copy and unflatten a sub-group) and :2840 (gather the small,
    persistent parameters again); stage_1_and_2.py:3172.
    """
    optimizer = engine.optimizer  # type: ignore[attr-defined]
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    release_whole_parameters(engine)
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
