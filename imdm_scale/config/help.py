"""The tree of settings as text for --help."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from imdm_scale.config.schema import Setting, settings


def help_text(width: int = 110, prefixes: tuple[str, ...] = ("",)) -> str:
    """Settings as `key  type  default`, indented by their depth, with their meaning below them.

    Args:
        width: of a line, in characters.
        prefixes: beginnings of the keys that are shown; by default all are.
    """
    lines: list[str] = []
    group = ""
    for setting in settings().values():
        if not setting.key.startswith(prefixes):
            continue
        parent = setting.key.rpartition(".")[0]
        if parent != group:
            lines.append("")
            group = parent
        lines += _lines(setting, width)
    return "\n".join(lines)


def _lines(setting: Setting, width: int) -> list[str]:
    indent = "  " * (1 + setting.key.count("."))
    head = f"{indent}{setting.key}  {setting.type_name}  {_shown(setting.default)}"
    meaning = " ".join(setting.doc.split())
    return [
        head,
        *textwrap.wrap(meaning, width, initial_indent=indent + "    ", subsequent_indent=indent + "    "),
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
