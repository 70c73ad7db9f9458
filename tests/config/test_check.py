"""Checks of whole configurations, and the network that they describe."""

from __future__ import annotations

from pathlib import Path

import pytest

from imdm_scale.assets import TEACHER
from imdm_scale.config.architecture import SIZES, architecture_of
from imdm_scale.config.check import check_config, check_layout
from imdm_scale.config.layout import run_layout
from imdm_scale.config.load import DEFAULT_RECIPE, build_config, parse_override, read_recipe
from imdm_scale.config.ranges import COUNT, RANGES
from imdm_scale.config.schema import settings
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

PRETRAIN = DEFAULT_RECIPE.with_name("pretrain_tiny.yaml")


def made(*overrides: str, recipe: Path = DEFAULT_RECIPE) -> Config:
    base = ["train.micro_batch_size=8", "train.global_batch_size=48"]
    return build_config([*read_recipe(recipe), *map(parse_override, [*base, *overrides])])


def refusal(*overrides: str, world_size: int = 1, recipe: Path = DEFAULT_RECIPE) -> str:
    with pytest.raises(UserError) as caught:
        check_config(made(*overrides, recipe=recipe), world_size)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_layouts_that_fit(world_size: int) -> None:
    check_config(made(), world_size)
    check_config(made("parallel.student.tp=2", "parallel.teacher.tp=2"), 2 * world_size)


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.student.tp=2"],
        ["parallel.teacher.tp=4"],
        ["parallel.student.tp=2", "parallel.student.pp=2", "parallel.student.sequence_parallel=true"],
        ["parallel.teacher.pp=4", "teacher.micro_batch_size=16"],
        ["teacher.placement=disaggregated", "parallel.student.tp=2", "parallel.teacher.pp=2"],
        ["teacher.placement=disaggregated", "teacher.ranks=1", "train.micro_batch_size=16"],
        ["teacher.placement=disaggregated", "teacher.ranks=[0,1,3]", "parallel.student.pp=1"],
        ["teacher.zero_stage=0", "teacher.prefetch=0", "teacher.checksum=true", "train.recompute=full"],
    ],
    ids=lambda words: " ".join(words),
)
def test_roles_have_layouts_of_their_own(words: list[str]) -> None:
    config = made("train.global_batch_size=96", *words)
    check_config(config, 4)
    run_layout(config, 4, zero_stage=3)


@pytest.mark.parametrize("key", [key for key, allowed in RANGES.items() if allowed == COUNT])
@pytest.mark.parametrize("value", ["0", "-2"])
def test_counts_are_at_least_one(key: str, value: str) -> None:
    message = refusal(f"{key}={value}")
    assert f"{key} is {value}" in message and "at least 1" in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("method.initial_steps", "1", "at least 2"),
        ("method.sampling_eps", "0.0", "above 0 and below 1"),
        ("method.visit_share", "0.0", "above 0 and at most 1"),
        ("method.trajectory_share", "1.0", "above 0 and below 1"),
        ("log.noise_draws", "1", "at least 2"),
        ("model.dropout", "1.0", "at least 0 and below 1"),
        ("model.dropout", "-0.1", "at least 0 and below 1"),
        ("model.dropout", "nan", "at least 0 and below 1"),
        ("model.noise_dim", "-1", "at least 0"),
        ("model.noise_scale", "0.0", "above 0"),
        ("model.noise_fourier", "-1", "at least 0"),
        ("model.num_masks", "-2", "at least 0"),
        ("model.rope_base", "1.0", "above 1"),
        ("model.norm_eps", "0.0", "above 0"),
        ("model.mlp_size", "0", "at least 1"),
        ("train.learning_rate", "0.0", "above 0"),
        ("train.learning_rate", "inf", "above 0"),
        ("train.min_lr_ratio", "1.5", "at least 0 and at most 1"),
        ("train.beta1", "1.0", "at least 0 and below 1"),
        ("train.beta2", "1.0", "at least 0 and below 1"),
        ("train.ema_decay", "1.0", "at least 0 and below 1"),
        ("train.gradient_clipping", "-1.0", "at least 0"),
        ("train.weight_decay", "-1.0", "at least 0"),
        ("evaluate.temperature", "0.0", "above 0"),
        ("seed", "-1", "at least 0"),
        ("teacher.zero_stage", "1", "0 or 3"),
        ("teacher.prefetch", "-1", "at least 0"),
        ("teacher.timeout", "0", "above 0"),
    ],
)
def test_ranges(key: str, value: str, allowed: str) -> None:
    message = refusal(f"{key}={value}")
    assert f"{key} is {value}" in message and message.endswith(f"must be {allowed}.")


def test_what_belongs_to_a_method() -> None:
    assert "model.noise_dim is 0; set it to 2 or more" in refusal("method.name=coupled", "model.noise_dim=0")
    order = refusal("method.vocabulary_order=frequency")
    assert "method.vocabulary_order is frequency, but method.name is im_sdtt" in order
    states = refusal("method.name=pretrain", "method.states=student")
    assert "method.states is student" in states and "set it to data" in states


def test_every_number_has_a_range() -> None:
    numbers = (int, float, list[float])
    assert set(RANGES) == {key for key, setting in settings().items() if setting.kind in numbers}


def test_every_number_of_a_list_is_checked() -> None:
    message = refusal("data.path=[tests,docs]", "data.weights=[1,0]")
    assert message == "data.weights is [1.0, 0.0], but must be above 0."


def test_data() -> None:
    assert made("data.path=[tests,docs]").data.path == ["tests", "docs"]
    assert made("data.path=s3://a/b: [c").data.path == "s3://a/b: [c"
    check_config(made("data.path=[tests,s3://bucket/owt]", "data.weights=[3,1.5]"), 1)
    assert "data.weights has 1 numbers" in refusal("data.path=[tests,docs]", "data.weights=[1]")
    assert "data.path is an empty list" in refusal("data.path=[]")
    assert "data.path is testz, which does not exist; did you mean tests" in refusal("data.path=[docs,testz]")


def test_bounds_that_are_allowed() -> None:
    check_config(
        made("model.dropout=0", "train.min_lr_ratio=1", "train.gradient_clipping=0", "model.noise_dim=0"), 1
    )


def test_unknown_size_lists_the_known() -> None:
    message = refusal("model.size=huge")
    assert "model.size is 'huge'" in message and all(name in message for name in SIZES)


def test_heads_and_width() -> None:
    message = refusal("model.num_heads=7", "model.hidden_size=256", recipe=PRETRAIN)
    assert "model.hidden_size 256" in message and "model.num_heads 7" in message and "to 4 or 8." in message
    odd = refusal("model.num_heads=2", "model.hidden_size=6", recipe=PRETRAIN)
    assert "heads of width 3" in odd and "set model.num_heads to 1 or 3." in odd
    assert "choose an even model.hidden_size" in refusal(
        "model.num_heads=1", "model.hidden_size=5", recipe=PRETRAIN
    )


def test_fourier_features_need_two_dimensions_of_noise() -> None:
    for noise_dim in (0, 1):
        message = refusal("model.noise_fourier=16", f"model.noise_dim={noise_dim}")
        assert f"model.noise_fourier is 16, but model.noise_dim is {noise_dim}" in message
        assert "set model.noise_dim to 2 or more, or model.noise_fourier=0" in message
    config = made("model.noise_fourier=16", "model.noise_dim=2")
    check_config(config, 1)
    assert architecture_of(config, vocab_size=7, mask_token_id=6).noise_fourier == 16


def test_masks_are_so_many_or_noise() -> None:
    assert "single mask is that of a plain masked diffusion model" in refusal("model.num_masks=1")
    message = refusal("model.num_masks=8", "model.noise_dim=4")
    assert (
        "model.num_masks is 8 and model.noise_dim is 4" in message and "leave one of the two out" in message
    )
    message = refusal("method.name=coupled", "model.num_masks=8")
    assert "model.num_masks is 8; set it to 0" in message
    config = made("model.num_masks=8")
    check_config(config, 1)
    shape = architecture_of(config, vocab_size=7, mask_token_id=6)
    assert (shape.num_masks, shape.noise_dim) == (8, 1)


def test_global_batch_that_does_not_divide() -> None:
    message = refusal("train.global_batch_size=20", world_size=1)
    assert "train.global_batch_size is 20" in message and "set it to 16 or 24" in message
    message = refusal("train.global_batch_size=8", world_size=2)
    assert "data-parallel size 2 = 16" in message and "set it to 16," in message
    check_config(made("train.global_batch_size=16"), 2)


def test_global_batch_divides_among_the_teachers_replicas() -> None:
    words = ["train.global_batch_size=16", "parallel.student.tp=2"]
    message = refusal(*words, world_size=4)
    assert "no multiple of train.micro_batch_size 8 x the teacher's data-parallel size 4 = 32" in message
    assert "set it to 32, or change train.micro_batch_size." in message
    message = refusal(*words, "teacher.micro_batch_size=3", world_size=4)
    assert "no multiple of teacher.micro_batch_size 3 x the teacher's data-parallel size 4 = 12" in message
    check_config(made(*words, "teacher.micro_batch_size=4"), 4)


def test_a_teacher_on_ranks_of_its_own_works_ahead() -> None:
    message = refusal("teacher.placement=disaggregated", "teacher.prefetch=0", world_size=2)
    assert "teacher.prefetch is 0" in message and "set it to 1 or more" in message


def test_methods_and_where_weights_come_from(tmp_path: Path) -> None:
    message = refusal(f"teacher.path={tmp_path}", recipe=PRETRAIN)
    assert f"teacher.path is {tmp_path}" in message and "train.init_from" in message
    message = refusal(f"train.init_from={tmp_path}")
    assert f"train.init_from is {tmp_path}" in message and "teacher.path" in message
    message = refusal("method.initial_steps=32", "method.min_steps=64")
    assert "method.min_steps is 64" in message and "32 or less" in message


def test_the_packaged_teacher_fixes_the_shape(tmp_path: Path) -> None:
    message = refusal("model.size=small")
    assert "model.size is small" in message and "model.size=tiny" in message and "teacher.path" in message
    assert "num_layers 5" in refusal("model.num_layers=5")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    check_config(made("model.size=small", f"teacher.path={tmp_path}"), 1)


@pytest.mark.parametrize("key", ["data.path", "tokenizer.path", "teacher.path", "train.init_from"])
def test_paths_exist(tmp_path: Path, key: str) -> None:
    (tmp_path / "owt_shards").mkdir()
    recipe = PRETRAIN if key == "train.init_from" else DEFAULT_RECIPE
    message = refusal(f"{key}={tmp_path}/owt_shard", recipe=recipe)
    assert f"{key} is {tmp_path}/owt_shard, which does not exist" in message
    assert "did you mean owt_shards?" in message


@pytest.mark.parametrize("key", ["teacher.path", "train.init_from"])
def test_a_model_folder_holds_a_model(tmp_path: Path, key: str) -> None:
    recipe = PRETRAIN if key == "train.init_from" else DEFAULT_RECIPE
    assert "no config.json and no model.safetensors" in refusal(f"{key}={tmp_path}", recipe=recipe)
    (tmp_path / "config.json").touch()
    message = refusal(f"{key}={tmp_path}", recipe=recipe)
    assert f"{key} is {tmp_path}, which holds no model.safetensors" in message
    (tmp_path / "model.safetensors.index.json").touch()  # the weights may be several files
    check_config(made(f"{key}={tmp_path}", recipe=recipe), 1)


def test_run_dir_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert "run_dir is" in refusal(f"run_dir={tmp_path}/run")


@pytest.mark.parametrize("steps", ["[]", "[0,1]", "[4,4]"])
def test_evaluation_steps(steps: str) -> None:
    message = refusal(f"evaluate.steps={steps}")
    assert "evaluate.steps is" in message and "[1,4,16]" in message


def test_shown_samples_are_among_the_sampled() -> None:
    message = refusal("evaluate.num_samples=2")
    assert "evaluate.shown_samples is 3" in message and "2 or less" in message


@pytest.mark.parametrize("size", SIZES)
def test_architecture_takes_the_size_and_then_the_overrides(size: str) -> None:
    shape = architecture_of(made(f"model.size={size}", "model.dropout=0.25"), 100, 99)
    assert {name: getattr(shape, name) for name in SIZES[size]} == SIZES[size]
    assert (shape.vocab_size, shape.mask_token_id, shape.length, shape.dropout) == (100, 99, 64, 0.25)
    words = ["model.hidden_size=12", "model.num_layers=3", "model.num_heads=2", "model.noise_dim=0"]
    words += [
        "model.qk_norm=true",
        "model.attention_softcap=50",
        "model.noise_kind=normal",
        "model.noise_scale=2",
    ]
    shape = architecture_of(made(f"model.size={size}", *words), 100, 99)
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.noise_dim) == (12, 3, 2, 0)
    assert (shape.qk_norm, shape.attention_softcap) == (True, 50.0)
    assert (shape.noise_kind, shape.noise_scale) == ("normal", 2.0)


def test_architecture_of_llamas_kind() -> None:
    mdlm = architecture_of(made("model.hidden_size=12", "model.num_heads=2"), 100, 99)
    assert (mdlm.norm, mdlm.mlp, mdlm.bias, mdlm.mlp_size) == ("layernorm", "gelu", True, 48)
    assert (mdlm.rope_base, mdlm.layer_norm_eps) == (10000.0, 1e-5)
    words = ["model.norm=rmsnorm", "model.norm_eps=1e-6", "model.mlp=swiglu", "model.mlp_size=40"]
    shape = architecture_of(made(*words, "model.bias=false", "model.rope_base=500000"), 100, 99)
    assert (shape.norm, shape.mlp, shape.bias, shape.mlp_size) == ("rmsnorm", "swiglu", False, 40)
    assert (shape.rope_base, shape.layer_norm_eps) == (500000.0, 1e-6)


def test_width_of_the_mlps_is_divided_by_tp() -> None:
    words = ["model.num_heads=4", "model.hidden_size=32", "parallel.student.tp=4"]
    message = refusal(*words, "model.mlp_size=42", world_size=4, recipe=PRETRAIN)
    assert (
        "parallel.student.tp is 4, which does not divide the 42 columns of the MLPs (model.mlp_size)"
        in message
    )
    assert "nearest on 4 ranks: tp 2 x pp 1" in message
    check_layout(made(*words, "model.mlp_size=44", recipe=PRETRAIN), 4)


def test_interleaved_stages_take_turns_in_whole_rounds() -> None:
    interleaved = ["parallel.student.pp=2", "parallel.student.virtual_stages=2", "model.num_layers=4"]
    check_config(made("train.global_batch_size=64", *interleaved), 2)
    three = ["train.global_batch_size=48", "train.micro_batch_size=16", "teacher.micro_batch_size=8"]
    message = refusal(*three, *interleaved, world_size=2)
    assert "parallel.student.virtual_stages is 2" in message and "an update has 3 on each replica" in message
    message = refusal("train.global_batch_size=64", "evaluate.batch_size=3", *interleaved, world_size=2)
    assert "evaluate.batch_size is 3" in message and "a multiple of parallel.student.pp, 2" in message


def test_shown_texts_are_among_the_sampled() -> None:
    message = refusal("evaluate.steps=[1,2]", "evaluate.shown_steps=4")
    assert "evaluate.shown_steps is 4, but texts are sampled in 1 or 2 steps" in message
    check_config(made("evaluate.steps=[1,2]", "evaluate.shown_steps=4", "evaluate.at_end=false"), 1)


def test_pairs_are_for_im_redi() -> None:
    message = refusal("method.name=im_redi", "data.path=null")
    assert "learns from pairs that a teacher made, but data.path is null" in message
    assert "tools/generate_pairs.py" in message
    assert "set method.name=im_redi" in refusal("method.fresh_noise=true")
    message = refusal("method.name=im_redi", f"data.path={TEACHER}", f"teacher.path={TEACHER}")
    assert "method.name is im_redi, which has no teacher" in message
    message = refusal("method.name=im_redi", f"data.path={TEACHER}", "method.states=student")
    assert "method.states is student, but method.name is im_redi" in message
    check_config(made("method.name=im_redi", f"data.path={TEACHER}", f"train.init_from={TEACHER}"), 2)
