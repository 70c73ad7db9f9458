"""The tree of settings as text for --help."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from imdm_scale.config.schema import Setting, settings


def help_text(width: int = 110) -> str:
    """Every setting as `key  type  default`, indented by its depth, with its meaning below it."""
    lines: list[str] = []
    group = ""
    for setting in settings().values():
        parent = setting.key.rpartition(".")[0]
        if parent != group:
            lines.append("")
            group = parent
        lines += _lines(setting, width)
    return "\n".join(lines)


def _lines(setting: Setting, width: int) -> list[str]:
    indent = "  " * (1 + setting.key.count("."))
    head = f"{indent}{setting.key}  {setting.type_name}  {_shown(setting.default)}"
    return [
        head,
        *textwrap.wrap(setting.doc, width, initial_indent=indent + "    ", subsequent_indent=indent + "    "),
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
