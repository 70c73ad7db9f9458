"""What tests of conversion share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imdm_scale.config.model_folder import INDEX_FILE as INDEX
from tests.checkpoint.llada_folder import describe, random_tensors


@pytest.fixture
def llada(tmp_path: Path) -> Callable[..., Path]:
    """Factory of a LLaDA folder in two files."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path / "llada"
        folder.mkdir()
        tensors = random_tensors(dtype)
        names = list(tensors)
        files = {"a.safetensors": names[:11], "b.safetensors": names[11:]}
        for file, held in files.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        where = {name: file for file, held in files.items() for name in held}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "modeling_llada.py").write_text("# theirs\n")
        describe(folder, **changes)
        return folder

    return make
