"""Every touch of a library's private names, in one place, each with the reason and the upstream line.

Written for DeepSpeed 0.19 and Megatron-core 0.16; another version is refused before it can go wrong silently.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

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
    """Make Megatron-core and DeepSpeed run on a machine without CUDA; patches nothing where CUDA is present."""
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
    # (core/utils.py:631, rotary_pos_embedding.py:162, tensor_parallel/mappings.py:91,181,
    # pipeline_parallel/p2p_communication.py:313).
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Between stages it waits for the device (p2p_communication.py:398).
    torch.cuda.synchronize = lambda device=None: None
    # DeepSpeed would compile a shared-memory all-reduce for two minutes at its first use (comm/torch.py:47).
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _TorchOnCpu(types.ModuleType):
    """`torch` as Megatron-core's schedules see it, where their literal device="cuda" means the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        """torch.zeros on the CPU where "cuda" is asked for."""
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def pipeline_schedules() -> types.ModuleType:
    """Megatron-core's schedules, fit for a machine without CUDA.

    They count tokens in a tensor on the literal device "cuda" (schedules.py:596,983,2138).
    """
    from megatron.core.pipeline_parallel import schedules

    if not torch.cuda.is_available():
        schedules.torch = _TorchOnCpu("torch")
    return schedules


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


def tag_for_grad_norm(
    parameter: torch.nn.Parameter, is_sharded: bool, tp_rank: int, has_stages: bool
) -> None:
    """Say whether tensor-parallel ranks hold different parts of a parameter or equal copies of it.

    DeepSpeed's gradient norm adds up the parts of the former and counts the latter once (runtime/utils.py:134,
    zero/stage3.py:2455, zero/stage_1_and_2.py:2682). Megatron-core sets the tag while it initialises a weight,
    which is left out here (tensor_parallel/layers.py:244,855,1178).

    Copies are counted on the first rank of the model-parallel group only, which is on the first pipeline stage
    (stage3.py:1982,2455, runtime/utils.py:394; ZeRO-1 and 2 go by the tensor-parallel rank), so those of later
    stages would be forgotten. With several stages the first tensor-parallel rank of each therefore claims its
    copies as parts.
    """
    parameter.tensor_model_parallel = is_sharded
    if has_stages and not is_sharded:
        parameter.model_parallel = tp_rank == 0


@contextlib.contextmanager
def barriers_within(group: dist.ProcessGroup) -> Iterator[None]:
    """DeepSpeed's barriers that name no group wait for `group` only inside the block.

    The stage-3 optimizer waits for the whole world while it is built (zero/stage3.py:765,774,914), so an engine
    on some of the ranks would wait for ranks that have no such engine. For disaggregated roles only.
    """
    import deepspeed.comm

    whole = deepspeed.comm.barrier

    def barrier(group_: Any = None, **options: Any) -> Any:
        return whole(group=group if group_ is None else group_, **options)

    deepspeed.comm.barrier = barrier
    try:
        yield
    finally:
        deepspeed.comm.barrier = whole


def compare_traces_among_replicas() -> None:
    """ZeRO-3 compares the order in which ranks use their parameters among data-parallel replicas only.

    DeepSpeed compares with rank 0 of the world (zero/partitioned_param_coordinator.py:260 by
    zero/utils.py assert_ints_same_as_other_ranks), and waits for ever where pipeline stages or roles differ in
    it. For ZeRO-3 with several stages, or on some of the ranks.
    """
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = _assert_same_among_replicas


def _assert_same_among_replicas(ints: list[int]) -> None:
    import deepspeed.utils.groups

    group = deepspeed.utils.groups.mpu.get_data_parallel_group()
    # The ids count from the process's first module, of another network maybe with other stages: compared are
    # their distances.
    distances = [number - ints[0] for number in ints]
    expected: list[Any] = [distances]
    dist.broadcast_object_list(expected, src=dist.get_global_rank(group, 0), group=group)
    if expected[0] != distances:
        raise RuntimeError(f"data-parallel replicas use their parameters in different orders: {ints}")


def let_backward_follow_backward(engine: Any) -> None:
    """Start DeepSpeed's bookkeeping of a backward pass when it begins, not only at the forward pass before it.

    ZeRO's optimizers reset their counters in `engine.forward` (runtime/engine.py:2992, base_optimizer.py:148).
    In the last phase of 1F1B a backward pass follows another one with no forward pass between, and its gradients
    would not be reduced. For several pipeline stages with ZeRO-1, 2 or 3.
    """

    def at_output(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        # On the very tensor on which the engine will hang its own hooks: this one must run before them.
        if output.requires_grad:
            output.register_hook(lambda grad: engine.optimizer.clear_backward_seen_flag())

    engine.module.register_forward_hook(at_output)


def clear_gradient_partitions(engine: Any) -> None:
    """Forget the last update's gradients before the first backward pass of the next.

    ZeRO-3 overwrites them in an update's first backward pass and adds to them in the others (stage3.py:2024), but
    where stages are interleaved that first pass is the first of one chunk of layers only.
    """
    engine.optimizer.grad_partitions_flat_buffer.zero_()


@contextlib.contextmanager
def backward_outside_engine(engine: Any) -> Iterator[None]:
    """Let a schedule call torch's backward on the outputs of a ZeRO-0 engine, which then is no more than a module.

    Without ZeRO's optimizer DeepSpeed takes backward passes from `engine.backward` only (runtime/engine.py:3129).
    Gradients are not reduced inside the block: see `reduce_gradients`.
    """
    engine._running_engine_backward = True
    try:
        yield
    finally:
        engine._running_engine_backward = False


def tag_gradients_for_norm(module: torch.nn.Module) -> None:
    """Give the gradients the tags of their parameters (`tag_for_grad_norm`).

    Without ZeRO and in bf16, DeepSpeed looks for the tags on the gradients themselves
    (fp16/unfused_optimizer.py:214), and would leave out all shards but those of the first tensor-parallel rank.
    """
    for parameter in module.parameters():
        if parameter.grad is not None:
            for tag in ("tensor_model_parallel", "model_parallel"):
                setattr(parameter.grad, tag, getattr(parameter, tag, False))


@contextlib.contextmanager
def no_first_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer's step does nothing inside the block.

    Without ZeRO and in bf16, DeepSpeed takes a step with zero gradients when it wraps an optimizer
    (fp16/unfused_optimizer.py:425, fp16/fused_optimizer.py:130). The weights would decay once more than they
    should, and Adam's correction of its first updates would count one too many. For ZeRO-0 in bf16 only.
    """
    optimizer.step = lambda: None
    try:
        yield
    finally:
        del optimizer.step


def clip_and_norm(engine: Any, max_norm: float) -> float:
    """Clip the gradients of an fp32 ZeRO-0 engine and return their norm before.

    The engine would clip by the same function, but throws the norm away (runtime/engine.py:3502).
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    limit = max_norm if max_norm > 0 else float("inf")
    return float(clip_grad_norm_(list(engine.module.parameters()), limit, mpu=engine.mpu))


def whole_gradient(engine: Any, parameter: torch.nn.Parameter) -> Tensor | None:
    """The gradient of this rank's shard of a parameter after the last backward pass of an update, whole over the
    data-parallel ranks and averaged over them; None for one without a gradient. Collective over these ranks.

    Without ZeRO it is the parameter's own; else utils/tensor_fragment.py:safe_get_full_grad gathers it.
    """
    from deepspeed.utils import safe_get_full_grad

    if not engine.zero_optimization():
        return parameter.grad
    return safe_get_full_grad(parameter)


def master_tensors(engine: Any) -> list[Tensor]:
    """The fp32 master weights that this rank owns, as the optimizer's state knows them; flat under ZeRO-1, 2 or 3.

    stage3.py: fp32_partitioned_groups_flat; stage_1_and_2.py: single_partition_of_fp32_groups;
    fp16/fused_optimizer.py: fp32_groups_flat; fp16/unfused_optimizer.py: fp32_groups (bf16 with ZeRO-0).
    """
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    if hasattr(optimizer, "fp32_groups"):
        return [weight for group in optimizer.fp32_groups for weight in group]
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def master_shards(engine: Any) -> list[Tensor]:
    """The data of `master_tensors`: views, writing changes them."""
    return [tensor.data for tensor in master_tensors(engine)]


def master_fragments(engine: Any, dp_rank: int) -> Iterator[tuple[torch.nn.Parameter, int, int, int, int]]:
    """What of each parameter lies where in `master_tensors`: (parameter, first of its elements, how many, number of
    the master tensor, place in it). The parameter is this rank's tensor-parallel shard, flattened.

    ZeRO-3 concatenates equal partitions, the last ones padded, in the order of its sub-groups (stage3.py:1948
    set_grad_positions). ZeRO-1 and 2 cut the concatenation of whole parameters (utils/tensor_fragment.py:378).
    Without ZeRO every rank owns everything: concatenated (fp16/fused_optimizer.py:86) or tensor by tensor.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for number, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                first = min(dp_rank * size, parameter.ds_numel)
                yield parameter, first, min(size, parameter.ds_numel - first), number, offset
                offset += size
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        for number, group in enumerate(optimizer.bit16_groups):
            for parameter in group:
                mapping = parameter._hp_mapping  # None where this rank's partition has nothing of it
                if mapping is not None:
                    own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield parameter, own.start, own.numel, number, there.start
    elif hasattr(optimizer, "fp32_groups_flat"):
        for number, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                yield parameter, 0, parameter.numel(), number, offset
                offset += parameter.numel()
    else:
        groups = getattr(optimizer, "fp16_groups", None) or [
            group["params"] for group in optimizer.param_groups
        ]
        for number, parameter in enumerate(parameter for group in groups for parameter in group):
            yield parameter, 0, parameter.numel(), number, 0


def release_whole_parameters(engine: Any) -> None:
    """Keep the partitions of ZeRO-3's parameters only; does nothing where parameters are not partitioned.

    DeepSpeed leaves parameters whole after an evaluation (partitioned_param_coordinator.py:528). Partitions that were
    written meanwhile would not be seen.
    """
    engine.empty_partition_cache()


def publish_master_shards(engine: Any) -> None:
    """Bring the working weights up to date with the master shards, as the end of an optimizer step does.

    stage3.py:2880 (release what is whole), :2854 (copy and unflatten a sub-group) and :2840 (gather the small,
    persistent parameters again); stage_1_and_2.py:3172; fp16/unfused_optimizer.py:232 and
    fp16/fused_optimizer.py:362 (ZeRO-0 in bf16; in fp32 the working weights are the masters).
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        release_whole_parameters(engine)
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups_flat"):
        for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            for weight, master in zip(group, _unflatten_dense_tensors(flat.data, group), strict=True):
                weight.data.copy_(master)
    elif hasattr(optimizer, "fp32_groups"):
        for masters, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for weight, master in zip(group, masters, strict=True):
                weight.data.copy_(master.data)


def partition_of(parameter: torch.nn.Parameter) -> Tensor | None:
    """This rank's flat partition of a ZeRO-3 parameter, or None where the parameter is not partitioned.

    partition_parameters.py attaches it as `ds_tensor`, padded so that all ranks hold equally many elements.
    """
    partition = getattr(parameter, "ds_tensor", None)
    return None if partition is None else partition.data
