"""What the JSON files beside a tokenizer call its special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
"""Where transformers 4 writes them as well."""
KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no such file.

    Raises:
        OSError, ValueError: it cannot be read, or is no object.
    """
    if not file.exists():
        return {}
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return content


def special_tokens(folder: Path) -> dict[str, str]:
    """Kind -> token, of the kinds in `KINDS` that a tokenizer's folder names.

    Raises:
        OSError, ValueError: a file cannot be read, or is no object.
    """
    return named_in(read_object(folder / SPECIAL_TOKENS_FILE)) | named_in(read_object(folder / CONFIG_FILE))


def named_in(content: Mapping[str, Any]) -> dict[str, str]:
    """The same of one object, in which a token is a string or an object with its string under "content"."""
    given = {kind: content.get(kind) for kind in KINDS}
    tokens = {
        kind: token.get("content") if isinstance(token, dict) else token for kind, token in given.items()
    }
    return {kind: str(token) for kind, token in tokens.items() if token}
