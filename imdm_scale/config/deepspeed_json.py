"""The DeepSpeed JSON reconciled with the tree of settings.

The recipe owns what changes the result (batch sizes, precision, clipping, the optimizer); the JSON owns how
memory and communication are arranged. What both can say must agree, or be left to the recipe by `"auto"`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from imdm_scale.config.layout import RunLayout, run_layout
from imdm_scale.config.nearest import did_you_mean, either
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

# fmt: off
TOP_LEVEL_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
    "fp16", "bf16", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "aio", "activation_checkpointing", "checkpoint", "disable_allgather",
    "disable_python_gc", "dump_state", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "timers", "flops_profiler", "comms_logger", "log_level", "tensorboard", "wandb", "csv_monitor",
    "comet", "autotuning", "datastates_ckpt", "vocabulary_size",
})
"""DeepSpeed's documented top-level keys that a user may set."""

ZERO_KEYS = frozenset({
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "overlap_comm",
    "load_from_fp32_weights", "elastic_checkpoint", "offload_param",
    "offload_optimizer", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_gradients", "memory_efficient_linear",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
    "enable_sanity_checks", "leaf_module",
})
"""DeepSpeed's documented keys under `zero_optimization` that a user may set."""
# fmt: on

REFUSED_KEYS = {
    "optimizer": "the recipe sets it by train.learning_rate, train.beta1, train.weight_decay and others",
    "scheduler": "the recipe sets it by train.lr_schedule, train.warmup_steps and train.min_lr_ratio",
    "torch_autocast": "the recipe sets the arithmetic by train.precision",
    "tensor_parallel": "the recipe sets it by parallel.student.tp and parallel.teacher.tp",
    "sequence_parallel_size": "tensor-parallel ranks share a sequence by parallel.student.sequence_parallel",
    "data_types": "gradients are added up in the arithmetic that the recipe sets by train.precision",
    "data_efficiency": "the recipe sets the data by data.path and the order of training by method.name",
    "dataloader_drop_last": "the data do not pass through DeepSpeed's loader",
    "gradient_allreduce_op": "the loss counts on gradients that are averaged over data-parallel ranks",
    "managed_gradient_accumulation": "the training loop counts the micro-batches of an update itself",
    "compile": "the engines are not compiled, so that it would have no effect",
}
"""DeepSpeed's keys that would change or contradict what the recipe says, and why they have no place here."""

REFUSED_ZERO_KEYS = {
    "zenflow": "it steps an optimizer of DeepSpeed's own at intervals of its own, and training steps torch's AdamW "
    "once an update",
    "compute_grad_norm": "every update reports the gradient's norm",
    "zero_quantized_nontrainable_weights": "a teacher's weights are written as they are, not as DeepSpeed's integers",
}
"""Keys under `zero_optimization` that do not work with the training loop, and why."""

DATA_PARALLEL_ONLY = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False,
}
"""ZeRO keys for which DeepSpeed (utils/groups.py) groups ranks by their global numbers, and their neutral values.

Such groups are right only where every rank is a whole replica; else they mix stages, shards and roles.
"""


def resolve_ds_config(
    raw: dict[str, Any], config: Config, world_size: int, path: Path, recipe: Path | None = None
) -> dict[str, Any]:
    """The dictionary that the student's engine is given.

    Args:
        raw: what the JSON file holds; it is not changed.
        config: a configuration that passed `check_config` with the same `world_size`.
        world_size: number of processes.
        path: the JSON file, for messages.
        recipe: the recipe file, for messages.

    Returns:
        `raw` with batch sizes, clipping and precision filled in. The engine is told of ONE micro-batch:
        `gradient_accumulation_steps` is 1 and `train_batch_size` is micro-batch times data-parallel size.

    Raises:
        UserError: an unknown or replaced key, a value out of range, or a contradiction with the recipe.
    """
    _refuse_foreign_keys(raw, path)
    resolved = copy.deepcopy(raw)
    micro = config.train.micro_batch_size
    zero = _block(resolved, "zero_optimization", path)
    layout = run_layout(config, world_size, _stage(zero, path))
    _check_zero(zero, layout, path)
    data_parallel = layout.student.dp
    accumulation = config.train.global_batch_size // (micro * data_parallel)
    bf16 = _block(resolved, "bf16", path)
    agreement = _Agreement(path, "the recipe" if recipe is None else f"{recipe} (with its overrides)")
    agreement.require(resolved, "train_batch_size", "train.global_batch_size", config.train.global_batch_size)
    agreement.require(resolved, "train_micro_batch_size_per_gpu", "train.micro_batch_size", micro)
    agreement.require(
        resolved,
        "gradient_accumulation_steps",
        f"train.global_batch_size / (train.micro_batch_size x data-parallel size {data_parallel})",
        accumulation,
    )
    agreement.require(
        resolved, "gradient_clipping", "train.gradient_clipping", config.train.gradient_clipping
    )
    agreement.require(
        bf16, "enabled", "train.precision", config.train.precision == "bf16", "bf16.", config.train.precision
    )
    # The training loop counts the micro-batches of an update itself, because the loss is normalised over the
    # whole global batch; the engine must neither divide by their number nor step before it is told to. It
    # still averages gradients over data-parallel ranks.
    resolved["gradient_accumulation_steps"] = 1
    resolved["train_micro_batch_size_per_gpu"] = micro
    resolved["train_batch_size"] = micro * data_parallel
    resolved["gradient_clipping"] = config.train.gradient_clipping
    resolved["bf16"] = {**bf16, "enabled": config.train.precision == "bf16"}
    resolved.pop("fp16", None)
    # torch's own AdamW runs everywhere; DeepSpeed's CPU one is compiled for minutes on its first use.
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def _stage(zero: dict[str, Any], path: Path) -> int:
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"zero_optimization.stage is {stage!r} in {path}, but must be 0, 1, 2 or 3.")
    return stage


def _check_zero(zero: dict[str, Any], layout: RunLayout, path: Path) -> None:
    """Refuses options that DeepSpeed leaves without effect at the stage, or that do not suit the layout."""
    stage = layout.student.zero_stage
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = "none" if zero.get(key) is None else _block(zero, key, path).get("device", "none")
        if device != "none" and stage < least:
            raise UserError(
                f"zero_optimization.{key}.device is {device!r} in {path}, but zero_optimization.stage is {stage}, "
                f"where DeepSpeed does not offload; set the stage to {either(range(least, 4))}, or remove the block."
            )
    offloaded = zero.get("offload_optimizer") or {}
    if offloaded.get("device") == "nvme":
        raise UserError(
            f"zero_optimization.offload_optimizer.device is 'nvme' in {path}, but the weights' average and checkpoints "
            "are made from master weights in memory; set it to cpu."
        )
    if layout.student.virtual_stages > 1 and offloaded.get("device", "none") != "none":
        raise UserError(
            f"zero_optimization.offload_optimizer.device is {offloaded['device']!r} in {path}, but "
            f"parallel.student.virtual_stages is {layout.student.virtual_stages}, and DeepSpeed would take only the "
            "gradients of the last backward pass to the host; remove the block, or set it to 1."
        )
    split = [role for role in layout.roles if role.tp * role.pp > 1]
    for key, neutral in DATA_PARALLEL_ONLY.items():
        if zero.get(key, neutral) != neutral and (split or layout.placement == "disaggregated"):
            cause = (
                f"the {split[0].role} has tp {split[0].tp} x pp {split[0].pp}" if split else "roles are apart"
            )
            raise UserError(
                f"zero_optimization.{key} is {zero[key]!r} in {path}, but {cause}, and DeepSpeed would group ranks "
                "for it as if each held a whole network; remove the key."
            )


class _Agreement:
    """Compares what the JSON says with what the recipe says."""

    def __init__(self, path: Path, recipe: str) -> None:
        self.path, self.recipe = path, recipe

    def require(
        self, block: dict[str, Any], name: str, key: str, value: Any, prefix: str = "", shown: Any = None
    ) -> None:
        """Passes if `block[name]` is absent, "auto" or equal to `value`, the recipe's `key`."""
        said = block.get(name, "auto")
        if said == "auto" or (said == value and isinstance(said, bool) == isinstance(value, bool)):
            return
        shown = value if shown is None else shown
        raise UserError(
            f'{prefix}{name} is {said!r} in {self.path}, but {key} is {shown} in {self.recipe}; write "auto" '
            "in the JSON, or make the two agree."
        )


def _refuse_foreign_keys(raw: dict[str, Any], path: Path) -> None:
    for key in raw:
        if key in REFUSED_KEYS:
            raise UserError(f"{key!r} in {path} must be removed: {REFUSED_KEYS[key]}.")
        if key not in TOP_LEVEL_KEYS:
            otherwise = "DeepSpeed's documentation lists its configuration keys."
            raise UserError(
                f"{key!r} in {path} is no known key; {did_you_mean(key, TOP_LEVEL_KEYS, otherwise)}"
            )
    for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"):
        wanted = key == "zero_allow_untested_optimizer"
        if raw.get(key, wanted) is not wanted:
            raise UserError(
                f"{key} is {raw[key]!r} in {path}, but training runs torch's AdamW, which needs "
                f"{str(wanted).lower()}; leave the key out."
            )
    if _block(raw, "fp16", path).get("enabled", False) not in (False, "auto"):
        raise UserError(
            f"fp16.enabled is {raw['fp16']['enabled']!r} in {path}, but fp16 is not supported; remove the "
            "block and set train.precision=bf16 in the recipe."
        )
    zero = _block(raw, "zero_optimization", path)
    for key in zero:
        if key in REFUSED_ZERO_KEYS:
            raise UserError(f"'zero_optimization.{key}' in {path} must be removed: {REFUSED_ZERO_KEYS[key]}.")
        if key not in ZERO_KEYS:
            otherwise = "DeepSpeed's documentation lists its ZeRO keys."
            question = did_you_mean(key, ZERO_KEYS, otherwise)
            raise UserError(f"'zero_optimization.{key}' in {path} is no known key; {question}")


def _block(raw: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    block = raw.get(name, {})
    if not isinstance(block, dict):
        raise UserError(f"{name} is {block!r} in {path}, but must be an object, {{...}}.")
    return block
