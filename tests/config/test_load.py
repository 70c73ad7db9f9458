"""Recipes, overrides and JSON files, right and wrong."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.assets import TEACHER
from imdm_scale.config.load import (
    DEFAULT_RECIPE,
    build_config,
    load_config,
    parse_override,
    read_json,
    read_recipe,
)
from imdm_scale.config.nearest import nearest
from imdm_scale.config.schema import groups
from imdm_scale.config.schema import settings as known_settings
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

ROOT = DEFAULT_RECIPE.parents[2]
ZERO3 = ROOT / "configs" / "ds" / "zero3.json"


def refusal(*overrides: str, recipe: Path | None = None, ds_config: Path = ZERO3) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides, ds_config, 1)
    return str(caught.value)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
@pytest.mark.parametrize("ds_config", sorted((ROOT / "configs" / "ds").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_files_load_and_check_clean(ds_config: Path, recipe: Path, world_size: int) -> None:
    small = ("quickstart", "pretrain_tiny", "synthetic", "books")
    if not recipe.stem.startswith(small):
        world_size *= 8
    # Where a recipe begins with what another run leaves, the package's teacher stands in.
    wanted = build_config(read_recipe(recipe))
    paths = {
        "teacher.path": wanted.teacher.path,
        "train.init_from": wanted.train.init_from,
        "data.path": wanted.data.path,
    }
    words = [f"{key}={TEACHER}" for key, path in paths.items() if "runs/" in str(path)]
    config, ds = load_config(recipe, words, ds_config, world_size)
    assert isinstance(config, Config)
    assert ds["train_batch_size"] == config.train.micro_batch_size * world_size
    assert ds["zero_optimization"]["stage"] == int(ds_config.stem[4])
    assert "auto" not in str(ds)


def test_every_shipped_kind_of_file_is_there() -> None:
    assert {p.stem for p in (ROOT / "configs" / "ds").glob("*.json")} == {
        "zero1",
        "zero2",
        "zero3",
        "zero3_offload",
    }
    assert {p.stem for p in (ROOT / "configs" / "recipes").glob("*.yaml")} >= {"quickstart", "pretrain_tiny"}


def test_overrides_come_after_the_recipe_and_keep_their_types(tmp_path: Path) -> None:
    recipe = written(
        tmp_path, "r.yaml", "train:\n  max_steps: 7\n  learning_rate: 1e-3\nlog:\n  wandb: off\ndata:\n"
    )
    words = [
        "train.max_steps=8",
        "train.max_steps=9",
        "evaluate.steps=[1,2]",
        "model.noise_dim=0",
        "run_dir=007",
    ]
    config = build_config([*read_recipe(recipe), *map(parse_override, words)])
    assert config.train.max_steps == 9
    assert config.train.learning_rate == 1e-3
    assert config.log.wandb == "off"  # not YAML's boolean
    assert config.evaluate.steps == [1, 2]
    assert config.model.noise_dim == 0
    assert config.run_dir == "007"


@pytest.mark.parametrize("word", ["model.noise_dim=null", "model.noise_dim=", "model.noise_dim=~"])
def test_null_can_be_written(word: str) -> None:
    assert build_config([parse_override("model.noise_dim=3"), parse_override(word)]).model.noise_dim is None


@pytest.mark.parametrize(
    ("written_value", "ranks"), [("3", 3), ("[6,7]", [6, 7]), ("[]", []), ("null", None)]
)
def test_a_setting_of_several_types(
    tmp_path: Path, written_value: str, ranks: int | list[int] | None
) -> None:
    assert build_config([parse_override(f"teacher.ranks={written_value}")]).teacher.ranks == ranks
    recipe = written(tmp_path, "r.yaml", f"teacher:\n  ranks: {written_value}\n")
    assert build_config(read_recipe(recipe)).teacher.ranks == ranks


def test_a_reference_between_settings_resolves() -> None:
    config = build_config([parse_override("run_dir=runs/${method.name}")])
    assert config.run_dir == "runs/im_sdtt"
    words = ["evaluate.batch_size=${train.micro_batch_size}", "train.micro_batch_size=3"]
    assert build_config([*map(parse_override, words)]).evaluate.batch_size == 3
    with pytest.raises(UserError, match=r"seed is '\${method.name}' in .* must be an integer"):
        build_config([parse_override("seed=${method.name}")])
    with pytest.raises(UserError, match="no_such"):
        build_config([parse_override("run_dir=${no_such}")])


def test_loading_needs_no_heavy_library() -> None:
    code = (
        "import sys; from pathlib import Path; from imdm_scale.config.cli import parse_train_arguments;"
        "from imdm_scale.config.load import load_config;"
        f"load_config(None, [], Path({str(ZERO3)!r}), 1);"
        "print(sorted({'torch', 'deepspeed', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "small_run.yaml", "seed: 1\n")
    message = refusal(recipe=tmp_path / "smal_run.yaml")
    assert "smal_run.yaml" in message and "did you mean small_run.yaml?" in message


def test_missing_json_names_its_neighbour() -> None:
    message = refusal(ds_config=ZERO3.with_name("zreo3.json"))
    assert "zreo3.json" in message and "zero3.json" in message


def test_missing_folder_is_said(tmp_path: Path) -> None:
    assert f"exists up to {tmp_path}" in refusal(recipe=tmp_path / "no" / "such" / "r.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read" in refusal(recipe=tmp_path)


def test_broken_yaml_has_line_and_column(tmp_path: Path) -> None:
    message = refusal(recipe=written(tmp_path, "r.yaml", "seed: 1\ntrain: {max_steps: 3\nmodel: 4\n"))
    assert "r.yaml, line 3, column 6" in message


def test_a_recipe_that_is_no_mapping(tmp_path: Path) -> None:
    assert "key: value" in refusal(recipe=written(tmp_path, "r.yaml", "- seed\n"))


def test_a_key_twice_in_a_recipe(tmp_path: Path) -> None:
    message = refusal(recipe=written(tmp_path, "r.yaml", "seed: 1\ntrain:\n  max_steps: 1\nseed: 2\n"))
    assert "seed stands twice" in message and "line 1" in message and "line 4" in message


def test_broken_json_has_line_and_column(tmp_path: Path) -> None:
    message = refusal(ds_config=written(tmp_path, "z.json", '{\n  "bf16": {},\n  "fp16" {}\n}'))
    assert "z.json, line 3, column 10" in message


def test_json_that_is_no_object_or_repeats_a_key(tmp_path: Path) -> None:
    assert "holds a list" in refusal(ds_config=written(tmp_path, "a.json", "[]"))
    message = refusal(ds_config=written(tmp_path, "b.json", '{"bf16": {}, "bf16": {}}'))
    assert "'bf16' stands twice" in message
    assert read_json(written(tmp_path, "c.json", '{"bf16": {}}')) == {"bf16": {}}


@pytest.mark.parametrize(
    ("written_key", "meant"),
    [
        ("train.max_step", "train.max_steps"),
        ("size", "model.size"),
        ("teacher.tp", "parallel.teacher.tp"),
        ("parallel.student.tpp", "parallel.student.tp"),
        ("train.lr", "train.learning_rate"),
        ("Model.Size", "model.size"),
    ],
)
def test_unknown_key_in_override_and_recipe(tmp_path: Path, written_key: str, meant: str) -> None:
    message = refusal(f"{written_key}=1")
    assert repr(written_key) in message and f"{written_key}=1" in message
    assert meant in message.partition("did you mean")[2]
    lines, depth = "seed: 1\n", written_key.split(".")
    for i, part in enumerate(depth):
        lines += "  " * i + part + (": 1\n" if i == len(depth) - 1 else ":\n")
    message = refusal(recipe=written(tmp_path, "r.yaml", lines))
    assert repr(written_key) in message and f"line {1 + len(depth)}" in message
    assert meant in message.partition("did you mean")[2]


def test_unknown_key_like_no_other_lists_what_there_is() -> None:
    assert "the keys there are data.path" in refusal("data.zzzzzzzz=1")
    assert "--help" in refusal("zzzzzzzz=1")


@pytest.mark.parametrize("group", groups())
def test_a_group_is_no_setting(tmp_path: Path, group: str) -> None:
    assert f"{group} in the override '{group}=1' is a group of settings; set one of {group}." in refusal(
        f"{group}=1"
    )


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("train.max_steps=many", "an integer"),
        ("train.max_steps=1.5", "an integer"),
        ("train.max_steps=null", "an integer"),
        ("train.max_steps=[1]", "an integer"),
        ("train.max_steps=[1", "an integer"),
        ("train.learning_rate=fast", "a number"),
        ("model.qk_norm=perhaps", "true or false"),
        ("model.noise_dim=x", "an integer, or null"),
        ("run_dir=null", "text"),
        ("evaluate.steps=4", "a list of integers, such as [1,2,4]"),
        ("evaluate.steps=[1,two]", "a list of integers"),
        ("teacher.ranks=last", "an integer or a list of integers, such as [1,2,4], or null"),
        ("teacher.ranks=[3,x]", "an integer or a list of integers"),
        ("teacher.checksum=yes", "true or false"),
        ("method.name=sdtt", "one of im_sdtt, coupled, im_redi, pretrain"),
        ("log.wandb=no", "one of off, offline, online"),
        ("train.precision=fp16", "one of fp32, bf16"),
        ("teacher.placement=elsewhere", "one of colocated, disaggregated"),
        ("model.noise_kind=", "one of uniform, normal"),
    ],
)
def test_wrong_type(word: str, wanted: str) -> None:
    message = refusal(word)
    key, _, value = word.partition("=")
    assert message.startswith(f"{key} is ")
    assert value in message and f"must be {wanted}" in message


def test_wrong_type_in_a_recipe_names_the_line(tmp_path: Path) -> None:
    message = refusal(recipe=written(tmp_path, "r.yaml", "train:\n  max_steps: many\n"))
    assert message.startswith("train.max_steps is 'many' in") and "r.yaml, line 2" in message


def test_override_without_equals_sign() -> None:
    message = refusal("train.max_steps")
    assert "'train.max_steps' has no '='" in message and "key=value" in message


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str]:
    """A known key, and the same with one letter dropped, doubled, changed or exchanged with the next."""
    key = draw(st.sampled_from(sorted(known_settings())))
    i = draw(st.integers(0, len(key) - 2))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    dropped, doubled = key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:]
    changed, exchanged = key[:i] + letter + key[i + 1 :], key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    spoilt = draw(st.sampled_from([dropped, doubled, changed, exchanged]))
    return key, spoilt


@settings(max_examples=300)
@given(typos())
def test_a_typo_suggests_the_right_key(pair: tuple[str, str]) -> None:
    key, spoilt = pair
    if spoilt not in known_settings():
        assert key in nearest(spoilt, known_settings())
