"""The DeepSpeed JSON against the recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from imdm_scale.config.deepspeed_json import (
    REFUSED_KEYS,
    REFUSED_ZERO_KEYS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
    resolve_ds_config,
)
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

JSON, RECIPE = Path("some/zero.json"), Path("some/recipe.yaml")


def config(**train: Any) -> Config:
    made = Config()
    made.train.micro_batch_size, made.train.global_batch_size, made.train.precision = 4, 32, "fp32"
    for name, value in train.items():
        setattr(made.train, name, value)
    return made


def refusal(raw: dict[str, Any], **train: Any) -> str:
    return refusal_of(raw, config(**train), 2)


def refusal_of(raw: dict[str, Any], made: Config, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        resolve_ds_config(raw, made, world_size, JSON, RECIPE)
    assert "some/zero.json" in str(caught.value)
    return str(caught.value)


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}
AGREEING = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1,
    "bf16": {"enabled": False},
}


@pytest.mark.parametrize("raw", [{}, AUTO, AGREEING], ids=["absent", "auto", "agreeing"])
def test_what_the_engine_is_given(raw: dict[str, Any]) -> None:
    raw = {"zero_optimization": {"stage": 3}, **raw}
    before = copy.deepcopy(raw)
    assert resolve_ds_config(raw, config(), 2, JSON) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert raw == before


def test_precision_and_tensor_parallel_reach_the_engine() -> None:
    made = config(precision="bf16", gradient_clipping=0.5)
    made.parallel.student.tp = 2
    raw = {
        "bf16": {"immediate_grad_update": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }
    ds = resolve_ds_config(raw, made, 4, JSON)
    assert ds["bf16"] == {"immediate_grad_update": True, "enabled": True}
    assert ds["gradient_clipping"] == 0.5
    assert ds["train_batch_size"] == 8
    assert "fp16" not in ds


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"train_batch_size": 48}, ["train_batch_size is 48", "train.global_batch_size is 32"]),
        ({"train_batch_size": "32"}, ["train_batch_size is '32'", "train.global_batch_size is 32"]),
        (
            {"train_micro_batch_size_per_gpu": 2},
            ["train_micro_batch_size_per_gpu is 2", "train.micro_batch_size is 4"],
        ),
        (
            {"gradient_accumulation_steps": 1},
            ["gradient_accumulation_steps is 1", "train.global_batch_size", "is 4 in"],
        ),
        ({"gradient_accumulation_steps": True}, ["gradient_accumulation_steps is True"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "train.gradient_clipping is 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled is True", "train.precision is fp32"]),
    ],
)
def test_a_contradiction_names_both_sides(raw: dict[str, Any], words: list[str]) -> None:
    message = refusal(raw)
    assert all(word in message for word in words), message
    assert "some/recipe.yaml" in message and '"auto"' in message


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_blocks_that_the_recipe_replaces(key: str) -> None:
    message = refusal({key: {}})
    assert repr(key) in message and "removed" in message and REFUSED_KEYS[key] in message


def test_optimizer_block_names_the_settings() -> None:
    assert "train.learning_rate" in refusal({"optimizer": {"type": "AdamW"}})
    assert "train.lr_schedule" in refusal({"scheduler": {"type": "WarmupLR"}})


def test_unknown_keys() -> None:
    assert "did you mean train_batch_size?" in refusal({"train_batchsize": 3})
    assert "bf16" in refusal({"bfloat16": {}}).partition("did you mean")[2]
    message = refusal({"zero_optimization": {"stage": 3, "overlap_com": True}})
    assert "'zero_optimization.overlap_com'" in message and "did you mean overlap_comm?" in message
    assert "DeepSpeed's documentation" in refusal({"xyzzy": 1})


def test_masters_on_nvme_are_refused() -> None:
    block = {"device": "nvme", "nvme_path": "/scratch"}
    message = refusal({"zero_optimization": {"stage": 3, "offload_optimizer": block}})
    assert "offload_optimizer.device is 'nvme'" in message and "set it to cpu" in message


@pytest.mark.parametrize("stage", [4, -1, "3", 2.0, True, None])
def test_stage(stage: Any) -> None:
    message = refusal({"zero_optimization": {"stage": stage}})
    assert f"zero_optimization.stage is {stage!r}" in message and "0, 1, 2 or 3" in message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_is_allowed(stage: int) -> None:
    raw = {"zero_optimization": {"stage": stage}}
    assert resolve_ds_config(raw, config(), 2, JSON)["zero_optimization"] == {"stage": stage}


def test_the_batch_is_that_of_the_students_ranks() -> None:
    made = config()
    made.teacher.placement, made.teacher.ranks, made.parallel.student.pp = "disaggregated", 2, 2
    made.model.num_layers = 12
    assert resolve_ds_config({}, made, 6, JSON)["train_batch_size"] == 8  # 2 replicas of 2 stages


@pytest.mark.parametrize(
    ("key", "stage", "allowed"),
    [
        ("offload_optimizer", 0, "1, 2 or 3"),
        ("offload_param", 0, "3"),
        ("offload_param", 1, "3"),
        ("offload_param", 2, "3"),
    ],
)
def test_offload_needs_a_stage_that_does_it(key: str, stage: int, allowed: str) -> None:
    message = refusal({"zero_optimization": {"stage": stage, key: {"device": "cpu"}}})
    assert f"zero_optimization.{key}.device is 'cpu'" in message and f"stage is {stage}" in message
    assert f"set the stage to {allowed}, or remove" in message
    for block in ({"device": "none"}, None):
        resolve_ds_config({"zero_optimization": {"stage": stage, key: block}}, config(), 2, JSON)


def test_interleaved_stages_keep_their_optimizer_on_the_device() -> None:
    made = config()
    made.parallel.student.pp = made.parallel.student.virtual_stages = 2
    raw = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    message = refusal_of(raw, made, 2)
    assert (
        "offload_optimizer.device is 'cpu'" in message and "parallel.student.virtual_stages is 2" in message
    )


@pytest.mark.parametrize("key", REFUSED_ZERO_KEYS)
def test_zero_options_that_do_not_suit_the_training(key: str) -> None:
    message = refusal({"zero_optimization": {"stage": 3, key: {}}})
    assert f"'zero_optimization.{key}'" in message and REFUSED_ZERO_KEYS[key] in message


@pytest.mark.parametrize(
    ("key", "value"), [("zero_hpz_partition_size", 2), ("zero_quantized_gradients", True)]
)
def test_zero_options_of_plain_data_parallelism(key: str, value: Any) -> None:
    raw = {"zero_optimization": {"stage": 3, key: value}}
    resolve_ds_config(raw, config(), 2, JSON)
    for role in ("student", "teacher"):
        made = config()
        getattr(made.parallel, role).pp = 2
        message = refusal_of(raw, made, 2)
        assert f"{key} is {value}" in message and f"the {role} has tp 1 x pp 2" in message
    made = config()
    made.teacher.placement = "disaggregated"
    assert "roles are apart" in refusal_of(raw, made, 2)


@pytest.mark.parametrize("enabled", [True, "true", 1])
def test_fp16_is_refused(enabled: Any) -> None:
    message = refusal({"fp16": {"enabled": enabled}})
    assert f"fp16.enabled is {enabled!r}" in message and "train.precision=bf16" in message


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16"])
def test_a_block_must_be_an_object(name: str) -> None:
    assert f"{name} is 3 in" in refusal({name: 3})


def test_optimizer_switches_cannot_be_turned() -> None:
    assert "zero_allow_untested_optimizer is False" in refusal({"zero_allow_untested_optimizer": False})
    assert "zero_force_ds_cpu_optimizer is True" in refusal({"zero_force_ds_cpu_optimizer": True})


def test_no_key_is_both_known_and_refused() -> None:
    assert not TOP_LEVEL_KEYS & set(REFUSED_KEYS)
    assert not ZERO_KEYS & set(REFUSED_ZERO_KEYS)
    assert "stage" in ZERO_KEYS
