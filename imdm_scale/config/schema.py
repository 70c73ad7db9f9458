"""The tree of settings read as a flat list of dotted keys, with the strings under the fields."""

from __future__ import annotations

import ast
import inspect
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from imdm_scale.config import tree


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree."""

    key: str
    """Dotted name, for example `train.max_steps`."""
    kind: Any
    """Its annotation without `| None`."""
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
        return self.kind is str or bool(self.words)

    @property
    def type_name(self) -> str:
        """The type as --help shows it."""
        name = "|".join(self.words) or getattr(self.kind, "__name__", str(self.kind))
        if get_origin(self.kind) is list:
            name = f"list of {get_args(self.kind)[0].__name__}"
        return f"{name} or null" if self.optional else name


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
        if get_origin(kind) in (Union, types.UnionType):
            kind, optional = next(k for k in get_args(kind) if k is not type(None)), True
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        found.append(Setting(prefix + f.name, kind, optional, default, field_docs()[cls.__name__, f.name]))
    return found
