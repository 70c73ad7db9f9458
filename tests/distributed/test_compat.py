"""Each of `parallel/compat.py`'s touches is needed: what goes wrong on real ranks where one is left out.

That all is right with them is what the other tests of this folder show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from imdm_scale.config.tree import Config
from imdm_scale.parallel import compat
from tests.distributed.cases import build, run_updates, whole_logits_BLV
from tests.distributed.pool import RankPool
from tests.distributed.small_run import Outcome, small_architecture, small_config, zero
from tests.tiny import plain_network, random_input

# Before any process prepares the libraries.
CUDA_FUNCTIONS = {"current_device": torch.cuda.current_device, "synchronize": torch.cuda.synchronize}
IMPATIENCE = timedelta(seconds=4)
"""How long ranks wait for each other in the whole world before a deadlock is an error."""

TOLERANCE = {"fp32": {"rtol": 1e-4, "atol": 1e-4}, "bf16": {"rtol": 0.1, "atol": 0.5}}


def nothing(*args: object, **options: object) -> None:
    """In the place of a patch."""


@contextlib.contextmanager
def no_block(*args: object) -> Iterator[None]:
    """In the place of a patch that lasts for a block."""
    yield


def lose_patience(*args: object) -> None:
    """In the place of a patch without which ranks wait in the whole world for ever."""
    dist.distributed_c10d._set_pg_timeout(IMPATIENCE, dist.group.WORLD)


@contextlib.contextmanager
def impatient_block(*args: object) -> Iterator[None]:
    """`lose_patience` where the patch lasts for a block."""
    lose_patience()
    yield


def tagged_as_without_stages(*args: Any) -> None:
    """`tag_for_grad_norm` as if the network were in one piece."""
    TAG_FOR_GRAD_NORM(*args[:3], False)


TAG_FOR_GRAD_NORM = compat.tag_for_grad_norm


def train_without(patch: str, put: Callable[..., Any], config: Config, ds_json: dict[str, Any]) -> Outcome:
    """A run's losses and gradient norms with `put` in the place of one of compat's functions."""
    with mock.patch.object(compat, patch, put):
        return run_updates(config, *build(config, ds_json))


def train_without_cuda_function(name: str, config: Config) -> None:
    """A run with Megatron-core's way to CUDA as it was."""
    setattr(torch.cuda, name, CUDA_FUNCTIONS[name])
    run_updates(config, *build(config, zero(0)))


def layout(
    method: str = "pretrain", tp: int = 1, pp: int = 1, placement: str = "colocated", **train: Any
) -> Config:
    """One update of four micro-batches a replica."""
    config = small_config(method, **{"max_steps": 1, "micro_batch_size": 2, **train})
    for role in (config.parallel.student, config.parallel.teacher):
        role.tp, role.pp = tp, pp
    config.teacher.placement = placement  # type: ignore[assignment]
    return config


def failure_of(pool: RankPool, case: Callable[..., Any], world_size: int, **arguments: Any) -> str:
    with pytest.raises(pytest.fail.Exception) as caught:
        pool.run(case, world_size, **arguments)
    return str(caught.value)


@pytest.fixture(scope="session")
def norm(reference: Callable[..., Outcome]) -> float:
    """The first update's gradient norm: the same for all methods' layouts, micro-batches and stages."""
    return reference("pretrain").grad_norms[0]


@pytest.mark.parametrize(
    ("name", "place"), [("current_device", "p2p_communication.py"), ("synchronize", "p2p_communication.py")]
)
def test_stages_without_cuda(pool: RankPool, name: str, place: str) -> None:
    failure = failure_of(pool, train_without_cuda_function, 2, name=name, config=layout(pp=2))
    assert place in failure and "CUDA" in failure, failure


def test_sequence_parallelism_without_cuda(pool: RankPool) -> None:
    config = layout(tp=2)
    config.parallel.student.sequence_parallel = True
    failure = failure_of(pool, train_without_cuda_function, 2, name="current_device", config=config)
    assert "mappings.py" in failure and "CUDA" in failure, failure


def schedules_as_they_are() -> Any:
    """Megatron-core's schedules, unpatched."""
    from megatron.core.pipeline_parallel import schedules

    return schedules


@pytest.mark.parametrize("pp", [1, 2])
def test_schedules_without_cuda(pool: RankPool, pp: int) -> None:
    failure = failure_of(
        pool,
        train_without,
        pp,
        patch="pipeline_schedules",
        put=schedules_as_they_are,
        config=layout(pp=pp),
        ds_json=zero(0),
    )
    assert "schedules.py" in failure and "CUDA" in failure, failure


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_grad_norm_without_tags(pool: RankPool, norm: float, stage: int) -> None:
    results = pool.run(
        train_without,
        2,
        patch="tag_for_grad_norm",
        put=nothing,
        config=layout(tp=2),
        ds_json=zero(stage),
    )
    assert results[0].grad_norms[0] < 0.9 * norm


@pytest.mark.parametrize("stage", [0, 3])  # ZeRO-1 and 2 count copies on each stage's first shard
def test_grad_norm_without_the_later_stages_copies(pool: RankPool, norm: float, stage: int) -> None:
    results = pool.run(
        train_without,
        2,
        patch="tag_for_grad_norm",
        put=tagged_as_without_stages,
        config=layout(pp=2),
        ds_json=zero(stage),
    )
    assert results[0].grad_norms[0] < 0.999 * norm


@pytest.mark.parametrize(
    ("stage", "place"), [(1, "in scaled_global_norm"), (2, "in scaled_global_norm"), (3, "in zero_grad")]
)
def test_backward_after_backward(pool: RankPool, stage: int, place: str) -> None:
    failure = failure_of(
        pool,
        train_without,
        2,
        patch="let_backward_follow_backward",
        put=nothing,
        config=layout(pp=2),
        ds_json=zero(stage),
    )
    # The optimizer finds gradients that nobody has reduced.
    assert "in step" in failure and place in failure, failure


@pytest.mark.parametrize(
    ("patch", "put", "config", "places"),
    [
        # Stages, or roles, use their parameters in different orders.
        (
            "compare_traces_among_replicas",
            lose_patience,
            layout(pp=2),
            ["partitioned_param_coordinator.py"],
        ),
        (
            "compare_traces_among_replicas",
            lose_patience,
            layout("im_sdtt", placement="disaggregated"),
            ["partitioned_param_coordinator.py"],
        ),
        # An engine on some of the ranks waits for all while it is built.
        (
            "barriers_within",
            impatient_block,
            layout("im_sdtt", placement="disaggregated"),
            ["stage3.py", "in barrier"],
        ),
    ],
    ids=["traces-of-stages", "traces-of-roles", "barriers"],
)
def test_zero_3_waits_for_the_whole_world(
    pool: RankPool, patch: str, put: Callable[..., Any], config: Config, places: list[str]
) -> None:
    failure = failure_of(pool, train_without, 2, patch=patch, put=put, config=config, ds_json=zero(3))
    assert all(place in failure for place in places), failure


def test_backward_of_zero_0(pool: RankPool) -> None:
    failure = failure_of(
        pool,
        train_without,
        1,
        patch="backward_outside_engine",
        put=no_block,
        config=layout(),
        ds_json=zero(0),
    )
    assert "Direct calls to tensor.backward() are not supported" in failure, failure


def test_the_shards_gradients_of_zero_0_in_bf16(pool: RankPool, norm: float) -> None:
    results = pool.run(
        train_without,
        2,
        patch="tag_gradients_for_norm",
        put=nothing,
        config=layout(tp=2, precision="bf16"),
        ds_json=zero(0),
    )
    assert results[0].grad_norms[0] < 0.9 * norm


def test_the_first_step_of_zero_0_in_bf16(pool: RankPool) -> None:
    config = layout(precision="bf16", max_steps=4, learning_rate=1e-2, warmup_steps=0)

    def losses(put: Callable[..., Any], stage: int) -> list[float]:
        given = {"patch": "no_first_step", "put": put, "config": config, "ds_json": zero(stage)}
        return pool.run(train_without, 1, **given)[0].losses

    expected = losses(compat.no_first_step, 1)
    assert losses(compat.no_first_step, 0) == pytest.approx(expected, abs=1e-3)
    assert losses(no_block, 0) != pytest.approx(expected, abs=1e-2)


def test_the_last_updates_gradients_of_interleaved_stages(pool: RankPool) -> None:
    config = layout(pp=2, max_steps=2)
    config.model.num_layers, config.parallel.student.virtual_stages = 4, 2

    def norms(put: Callable[..., Any]) -> list[float]:
        given = {"patch": "clear_gradient_partitions", "put": put, "config": config, "ds_json": zero(3)}
        return pool.run(train_without, 2, **given)[0].grad_norms

    first, second = norms(compat.clear_gradient_partitions)
    assert norms(nothing)[0] == first
    assert abs(norms(nothing)[1] / second - 1) > 0.1


def engine_that_clips(config: Config) -> None:
    """A run in which ZeRO-0's engine is left to clip by itself."""
    run_layout, parts = build(config, zero(0))
    assert parts.student is not None
    parts.student.engine._config.gradient_clipping = config.train.gradient_clipping
    parts.student.clips_itself = False
    run_updates(config, run_layout, parts)


def test_norm_of_zero_0(pool: RankPool) -> None:
    failure = failure_of(pool, engine_that_clips, 1, config=layout())
    assert "get_global_grad_norm" in failure and "not 'NoneType'" in failure, failure


def test_gradients_are_reduced_over_the_last_engines_replicas(
    pool: RankPool, reference: Callable[..., Outcome]
) -> None:
    config = layout("im_sdtt")
    config.parallel.student.tp = 2
    results = pool.run(
        train_without, 2, patch="set_deepspeed_mpu", put=nothing, config=config, ds_json=zero(0)
    )
    assert abs(results[0].grad_norms[0] / reference("im_sdtt").grad_norms[0] - 1) > 0.01


def logits_around_publishing(config: Config, ds_json: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits of a student that has been evaluated, whose master weights then grow, and what it has of them."""
    _, parts = build(config, ds_json)
    student = parts.student
    assert student is not None
    logits = {"before": whole_logits_BLV(student)}
    shards = compat.master_shards(student.engine)
    for shard in shards:
        shard.mul_(1.5)
    logits["unpublished"] = whole_logits_BLV(student)
    with mock.patch.object(compat, "release_whole_parameters", nothing):
        compat.publish_master_shards(student.engine)
    logits["unreleased"] = whole_logits_BLV(student)
    compat.publish_master_shards(student.engine)
    logits["published"] = whole_logits_BLV(student)
    return logits | {"sizes": np.array([shard.numel() for shard in shards])}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_master_shards_are_seen_when_published(pool: RankPool, stage: int, precision: str) -> None:
    config = layout(precision=precision)
    results = pool.run(logits_around_publishing, 2, config=config, ds_json=zero(stage))
    network = plain_network(small_architecture(config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
        ids_BL, noise_BLD = random_input(small_architecture(config))
        expected_BLV = network(ids_BL, mask_noise=noise_BLD).logits.numpy()
    count = sum(parameter.numel() for parameter in network.parameters())
    owned = [int(logits["sizes"].sum()) for logits in results]
    if stage == 0:
        assert owned == [count, count]
    else:
        assert count <= sum(owned) < 1.05 * count  # padded to equal parts
    for logits in results:
        has_masters_apart = stage > 0 or precision == "bf16"
        assert np.array_equal(logits["unpublished"], logits["before"]) == has_masters_apart
        # Without a release some parameters stay what they were when last gathered.
        assert np.array_equal(logits["unreleased"], logits["published"]) == (stage < 3)
        np.testing.assert_allclose(logits["published"], expected_BLV, **TOLERANCE[precision])


def test_partitions_are_found(pool: RankPool) -> None:
    failure = failure_of(
        pool, train_without, 1, patch="partition_of", put=nothing, config=layout(), ds_json=zero(3)
    )
    assert "in write_shard" in failure, failure


def dtype_under_zero_init(asked: str) -> str:
    """The dtype of a parameter for which zero.Init was asked for another."""
    import deepspeed

    with deepspeed.zero.Init(dtype=getattr(torch, asked)):
        return str(torch.nn.Linear(2, 2).weight.dtype)


def test_zero_init_cannot_be_told_a_dtype(pool: RankPool) -> None:
    # Why `build_module` gives it the configuration instead (zero/partition_parameters.py:409, an `or` that
    # binds more tightly than the `if` after it).
    assert pool.run(dtype_under_zero_init, 1, asked="float32") == ["torch.bfloat16"]


def patches_of_a_run(config: Config, ds_json: dict[str, Any]) -> set[str]:
    """Which of compat's functions act in a run."""
    with contextlib.ExitStack() as stack:
        seen = {
            name: stack.enter_context(mock.patch.object(compat, name, wraps=getattr(compat, name)))
            for name in CONDITIONAL
        }
        run_updates(config, *build(config, ds_json))
    return {name for name, function in seen.items() if function.called}


CONDITIONAL = {
    "barriers_within",
    "compare_traces_among_replicas",
    "let_backward_follow_backward",
    "backward_outside_engine",
    "clip_and_norm",
    "clear_gradient_partitions",
    "no_first_step",
    "tag_gradients_for_norm",
}


@pytest.mark.parametrize(
    ("stage", "config", "expected"),
    [
        (0, layout(pp=2), {"backward_outside_engine", "clip_and_norm"}),
        (
            0,
            layout(precision="bf16"),
            {"backward_outside_engine", "no_first_step", "tag_gradients_for_norm"},
        ),
        (2, layout("im_sdtt", tp=2), set()),
        (3, layout("im_sdtt"), set()),
        (1, layout(pp=2), {"let_backward_follow_backward"}),
        (3, layout(pp=2), {"let_backward_follow_backward", "compare_traces_among_replicas"}),
        (
            3,
            layout("im_sdtt", placement="disaggregated"),
            {"barriers_within", "compare_traces_among_replicas"},
        ),
    ],
)
def test_patches_act_only_where_needed(
    pool: RankPool, stage: int, config: Config, expected: set[str]
) -> None:
    assert pool.run(patches_of_a_run, 2, config=config, ds_json=zero(stage)) == [expected] * 2
