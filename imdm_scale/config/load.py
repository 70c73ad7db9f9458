"""From a recipe, overrides and a DeepSpeed JSON to one checked configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imdm_scale.config.check import check_config
from imdm_scale.config.deepspeed_json import resolve_ds_config
from imdm_scale.config.nearest import did_you_mean, near_files
from imdm_scale.config.schema import Setting, groups, settings
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

DEFAULT_RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "quickstart.yaml"


def load_config(
    recipe: Path | None, overrides: Sequence[str], ds_config: Path, world_size: int | None = None
) -> tuple[Config, dict[str, Any]]:
    """The checked configuration, and the DeepSpeed dictionary that goes with it.

    Args:
        recipe: YAML file; None takes `configs/recipes/quickstart.yaml`.
        overrides: `key=value` words, applied in order after the recipe.
        ds_config: DeepSpeed JSON file.
        world_size: number of processes; None takes the launcher's WORLD_SIZE, or 1 without a launcher.

    Raises:
        UserError: any mistake in the files, in the overrides or in their combination.
    """
    recipe = DEFAULT_RECIPE if recipe is None else recipe
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    raw = read_json(ds_config)
    config = build_config([*read_recipe(recipe), *map(parse_override, overrides)])
    check_config(config, world_size)
    return config, resolve_ds_config(raw, config, world_size, ds_config, recipe)


class Entry(NamedTuple):
    """One setting as the user wrote it."""

    key: str
    value: Any
    origin: str
    """Where it stands, in words."""


def build_config(entries: Sequence[Entry]) -> Config:
    """The tree's defaults with `entries` laid over them in order.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    last = {entry.key: (_setting_named(entry.key, entry.origin), entry) for entry in entries}
    try:
        tree = OmegaConf.create(asdict(Config()))
        for key, (_, entry) in last.items():
            OmegaConf.update(tree, key, entry.value, merge=False)
        resolved: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            f"A ${{...}} reference in the configuration does not resolve: {error.msg}."
        ) from error
    config = Config()
    for key, (setting, entry) in last.items():
        *group, name = key.split(".")
        value = reduce(getitem, group, resolved)[name]
        try:
            setattr(reduce(getattr, group, config), name, setting.convert(value))
        except ValueError as error:
            raise UserError(_wrong_value(setting, entry)) from error
    return config


def read_recipe(path: Path) -> list[Entry]:
    """The settings of a YAML file.

    Raises:
        UserError: the file does not exist, does not parse, or holds something else than settings.
    """
    text = _read_text(path, "recipe")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"The recipe {path}{where}, is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {error}.") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"The recipe {path} must hold `key: value` lines, such as `seed: 1`.")
    entries = list(_flatten(root, "", path))
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.key in seen:
            raise UserError(
                f"{entry.key} stands twice in the recipe, at {seen[entry.key]} and {entry.origin}."
            )
        seen[entry.key] = entry.origin
    return entries


def parse_override(text: str) -> Entry:
    """The setting in one `key=value` word.

    Raises:
        UserError: there is no `=`, the key is unknown, or the value does not parse.
    """
    origin = f"the override {text!r}"
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(
            f"The override {text!r} has no '='; write it as key=value, such as train.max_steps=100."
        )
    setting = _setting_named(key, origin)
    if setting.is_text and not (setting.may_be_list and value.startswith("[")):
        return Entry(key, None if value in ("", "~", "null") else value, origin)
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(_wrong_value(setting, Entry(key, value, origin))) from error
    return Entry(key, None if node is None else _value(node), origin)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file does not exist, does not parse, repeats a key, or holds no object.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{key!r} stands twice in {path}; keep one of them.")
        return dict(pairs)

    try:
        raw = json.loads(_read_text(path, "DeepSpeed configuration"), object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}, is not valid JSON: {error.msg}."
        ) from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold one JSON object, {{...}}, but holds a {type(raw).__name__}.")
    return raw


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"There is no {what} at {path}; {near_files(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The {what} {path} cannot be read: {reason}.") from error


def _flatten(node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[Entry]:
    for key_node, value_node in node.value:
        origin = f"{path}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"The key at {origin} must be a plain name.")
        key = prefix + key_node.value
        if isinstance(value_node, yaml.MappingNode):
            yield from _flatten(value_node, f"{key}.", path)
        elif key in groups() and _value(value_node) is None:
            continue  # an empty section
        else:
            yield Entry(key, _value(value_node), origin)


def _value(node: yaml.Node) -> Any:
    # Scalars stay text, for the tree says what they are: YAML's own guess would turn `off` into a boolean,
    # `1e-3` into text and a folder called 007 into 7.
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in ("", "~", "null") else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    return {key.value: _value(item) for key, item in node.value}


def _setting_named(key: str, origin: str) -> Setting:
    if key in settings():
        return settings()[key]
    group = key.rpartition(".")[0]
    inside = [known for known in settings() if known.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{key} in {origin} is a group of settings; set one of {', '.join(inside)}.")
    siblings = [known for known in settings() if known.rpartition(".")[0] == group]
    otherwise = (
        f"the keys there are {', '.join(siblings)}." if group and siblings else "--help lists every key."
    )
    raise UserError(f"{key!r} in {origin} is no known key; {did_you_mean(key, settings(), otherwise)}")


def _wrong_value(setting: Setting, entry: Entry) -> str:
    if setting.words:
        wanted = f"one of {', '.join(setting.words)}"
    else:
        names: dict[Any, str] = {
            int: "an integer",
            float: "a number",
            bool: "true or false",
            str: "text",
            list[int]: "a list of integers, such as [1,2,4]",
            list[float]: "a list of numbers, such as [3,1]",
            list[str]: "a list of texts, such as [a,b]",
        }
        wanted = " or ".join(names[kind] for kind in setting.kinds)
    if setting.optional:
        wanted += ", or null"
    value = "null" if entry.value is None else repr(entry.value)
    return f"{setting.key} is {value} in {entry.origin}, but must be {wanted}."
