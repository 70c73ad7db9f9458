"""The tree of settings read as a flat list of dotted keys, with the strings under the fields."""

from __future__ import annotations

import ast
import contextlib
import inspect
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from imdm_scale.config import tree

UNIONS = (Union, types.UnionType)
"""Origins of annotations such as `int | None`."""


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree."""

    key: str
    """Dotted name, for example `train.max_steps`."""
    kind: Any
    """Its annotation without `| None`; more than one type is a Union."""
    optional: bool
    """Whether null is allowed."""
    default: Any
    """Value when neither recipe nor override names it."""
    doc: str
    """The string under the field."""

    @property
    def words(self) -> tuple[str, ...]:
        """The allowed words; empty where any value of the type is allowed."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def is_text(self) -> bool:
        """Whether the value is text, which is taken as it stands."""
        return str in self.kinds or bool(self.words)

    @property
    def may_be_list(self) -> bool:
        """Whether the value may be a list, written [a,b]."""
        return any(get_origin(kind) is list for kind in self.kinds)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that are allowed: those of a Union, or the one kind."""
        return get_args(self.kind) if get_origin(self.kind) in UNIONS else (self.kind,)

    @property
    def type_name(self) -> str:
        """The type as --help shows it."""
        return " or ".join([*map(_type_name, self.kinds), *["null"] * self.optional])

    def convert(self, value: Any) -> Any:
        """The value that a text (for a list: a list of texts) stands for; null is None.

        Raises:
            ValueError: it is no value of this setting's types.
        """
        if value is None and self.optional:
            return None
        for kind in self.kinds:
            with contextlib.suppress(ValueError):
                return _convert(kind, value)
        raise ValueError(f"{value!r} is no {self.type_name}")


@cache
def settings() -> dict[str, Setting]:
    """Every leaf of the tree by its dotted key, in the tree's order."""
    return {setting.key: setting for setting in _walk(tree.Config, "")}


@cache
def groups() -> tuple[str, ...]:
    """Dotted names of the inner nodes, for example `parallel` and `parallel.student`."""
    names = {key[:i]: None for key in settings() for i, letter in enumerate(key) if letter == "."}
    return tuple(names)


@cache
def field_docs() -> dict[tuple[str, str], str]:
    """The string under each field of tree.py, by (class, field)."""
    docs = {}
    for cls in ast.parse(inspect.getsource(tree)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for node, below in zip(cls.body, cls.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(node.target, ast.Name) and isinstance(below.value, ast.Constant)
                docs[cls.name, node.target.id] = str(below.value.value)
    return docs


def _walk(cls: type, prefix: str) -> list[Setting]:
    hints = get_type_hints(cls)
    found = []
    for f in fields(cls):
        kind, optional = hints[f.name], False
        if isinstance(kind, type) and is_dataclass(kind):
            found += _walk(kind, f"{prefix}{f.name}.")
            continue
        if get_origin(kind) in UNIONS:
            alternatives = tuple(k for k in get_args(kind) if k is not type(None))
            kind, optional = Union[alternatives], len(alternatives) < len(get_args(kind))  # noqa: UP007
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        found.append(Setting(prefix + f.name, kind, optional, default, field_docs()[cls.__name__, f.name]))
    return found


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_type_name(get_args(kind)[0])}"
    return kind.__name__


def _convert(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(value)
        return [_convert(get_args(kind)[0], item) for item in value]
    if value is None or isinstance(value, list | dict):
        raise ValueError(value)
    text = str(value)
    if get_origin(kind) is Literal and text not in get_args(kind):
        raise ValueError(text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return text if get_origin(kind) is Literal else kind(text)
