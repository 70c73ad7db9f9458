"""The arguments of tools/train.py and its --help."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from imdm_scale.config import tree
from imdm_scale.config.cli import parse_train_arguments
from imdm_scale.config.help import help_text
from imdm_scale.config.schema import field_docs, settings
from imdm_scale.errors import UserError


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_train_arguments(words)
    return str(caught.value)


def test_flags_and_overrides_in_any_order() -> None:
    words = [
        "--local_rank=1",
        "seed=3",
        "--ds_config",
        "z.json",
        "train.max_steps=5",
        "--recipe",
        "r.yaml",
        "a=-1",
    ]
    arguments = parse_train_arguments(words)
    assert (arguments.ds_config, arguments.recipe, arguments.local_rank) == (
        Path("z.json"),
        Path("r.yaml"),
        1,
    )
    assert arguments.overrides == ["seed=3", "train.max_steps=5", "a=-1"]


def test_defaults() -> None:
    arguments = parse_train_arguments(["--ds_config", "z.json"])
    assert (arguments.recipe, arguments.local_rank, arguments.overrides) == (None, 0, [])


def test_ds_config_is_required() -> None:
    message = refusal("seed=3")
    assert "--ds_config is missing" in message and "configs/ds/zero3.json" in message


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("--ds_confg", "did you mean --ds_config?"),
        ("--deepspeed_config=x", "--ds_config"),
        ("--recipes=x", "did you mean --recipe?"),
        ("--rec=x", "did you mean --recipe?"),
        ("--train.max_steps=5", "train.max_steps=VALUE"),
        ("-z", "--ds_config, --recipe"),
    ],
)
def test_unknown_flag(word: str, remedy: str) -> None:
    message = refusal("--ds_config", "z.json", word)
    assert word.partition("=")[0] in message and remedy in message


def test_flag_without_or_with_a_bad_value() -> None:
    assert "--recipe" in refusal("--ds_config", "z.json", "--recipe")
    assert "'x'" in refusal("--ds_config", "z.json", "--local_rank", "x")


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_train_arguments(["--help"])
    assert ended.value.code == 0
    assert help_text() in capsys.readouterr().out


@pytest.mark.parametrize("key", settings())
def test_help_has_key_type_default_and_meaning(key: str) -> None:
    setting = settings()[key]
    head = next(line for line in help_text(width=1000).splitlines() if line.strip().startswith(f"{key}  "))
    assert setting.type_name in head
    assert setting.doc and " ".join(setting.doc.split()) in help_text(width=1000)


def test_help_in_full_for_some_settings() -> None:
    text = help_text(width=1000)
    assert "    train.precision  fp32|bf16  bf16\n        Arithmetic of the networks" in text
    assert "    teacher.path  str or null  null\n" in text
    assert "    evaluate.steps  list of int  [1, 2, 4, 8, 16, 32]\n" in text
    assert "    evaluate.at_end  bool  true\n" in text
    assert "      parallel.student.tp  int  1\n" in text
    assert "    teacher.ranks  int or list of int or null  null\n" in text
    assert "    evaluate.at_end  bool" in text and "seed" not in help_text(prefixes=("train.", "log."))


def test_every_field_has_its_string() -> None:
    classes = [cls for cls in vars(tree).values() if isinstance(cls, type) and is_dataclass(cls)]
    assert set(field_docs()) == {(cls.__name__, f.name) for cls in classes for f in fields(cls)}
