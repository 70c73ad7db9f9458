"""LLaDA's Hugging Face folders (GSAI-ML/LLaDA-8B-Base and its like): import, and export back.

LLaDA (arXiv 2502.09992) is a masked diffusion model on Llama's network with full attention: the logits at a position
are of its own token, and rotary pairs are (i, i + K/2), both as here. So tensors pass as they are, bit for bit; those
that this project holds as one (queries, keys and values; SwiGLU's gate and value) are put one above the other.
Tensor names: modeling_llada.py in that repository.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from imdm_scale.checkpoint.llada_config import (
    CONFIG_FILE,
    architecture_of_llada,
    llada_of_architecture,
    read_config,
)
from imdm_scale.checkpoint.weights import Source
from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError
from imdm_scale.hf.safetensors_writer import TensorEntry
from imdm_scale.hf.shard_files import MAX_SHARD_SIZE, parse_size, write_shards
from imdm_scale.hf.weight_files import open_weights
from imdm_scale.model.weights import canonical_shapes

PREFIX = "model.transformer."
_OF_BLOCK = {
    "norm1": ("attn_norm",),
    "attention.qkv": ("q_proj", "k_proj", "v_proj"),
    "attention.out": ("attn_out",),
    "norm2": ("ff_norm",),
    "mlp.dense_in": ("ff_proj", "up_proj"),
    "mlp.dense_out": ("ff_out",),
}
_OTHERS = {"token_embedding": "wte", "final_norm": "ln_f", "head": "ff_out"}


def llada_names(name: str) -> list[str]:
    """LLaDA's names of the tensors that, one above the other, are the tensor of a canonical name."""
    stem = name.removesuffix(".weight")
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", stem):
        return [f"{PREFIX}{match[1]}{theirs}.weight" for theirs in _OF_BLOCK[match[2]]]
    return [f"{PREFIX}{_OTHERS[stem]}.weight"]


def read_llada(folder: Path, vocab_size: int | None = None) -> tuple[Architecture, Source]:
    """The network of a LLaDA folder, and its tensors under the canonical names, each read when asked for.

    The tensors keep the type in which they are stored. The architecture has noise_dim 0; a student of any noise may
    start from these weights (`checkpoint.weights.folder_weights`).

    Args:
        folder: LLaDA's.
        vocab_size: how many of the first token ids to keep: those of the tokenizer with which a run is to start from
            this model, whose embedding has rows beyond them that round up its size. None keeps all, bit for bit.

    Raises:
        UserError: the folder is not LLaDA's, of a kind that cannot be imported, or damaged, or has not so many ids.
    """
    path = folder / CONFIG_FILE
    architecture = architecture_of_llada(read_config(folder), path)
    files = open_weights(folder)
    found, tensor = dict(files.shapes), files.tensor
    expected = canonical_shapes(architecture)
    for name, shape in expected.items():
        theirs = llada_names(name)
        for its_name in theirs:
            its_shape = (shape[0] // len(theirs), *shape[1:])
            if found.pop(its_name, None) != its_shape:
                raise UserError(
                    f"{folder} has no {its_name} of shape {its_shape}, which its {CONFIG_FILE} promises; fetch the "
                    "folder again."
                )
    if found:
        raise UserError(
            f"{folder} has tensors that have no place in LLaDA's network: {', '.join(sorted(found)[:3])}"
            f"{' and more' * (len(found) > 3)}; only models of LLaDA-8B's kind can be imported."
        )

    kept = architecture.vocab_size if vocab_size is None else vocab_size
    if not architecture.mask_token_id < kept <= architecture.vocab_size:
        raise UserError(
            f"{kept} token ids are to be kept of {folder}, but its mask's is {architecture.mask_token_id} and its "
            f"embedding has {architecture.vocab_size} rows; give the number of ids of its own tokenizer."
        )

    def whole_tensor(name: str) -> Tensor:
        parts = [tensor(its_name) for its_name in llada_names(name)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[:kept] if name in ("token_embedding.weight", "head.weight") else whole

    return dataclasses.replace(architecture, vocab_size=kept), whole_tensor


def write_llada(
    folder: Path,
    architecture: Architecture,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    like: Path | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a network as a LLaDA folder. It is complete or absent: written beside its place, then renamed.

    Args:
        folder: where to; must not exist yet, or be empty.
        architecture: the network.
        source: canonical name -> whole tensor; asked for one after the other.
        dtype: type to store the weights in; None keeps that of the source.
        like: a LLaDA folder whose tokenizer and code are copied, and whose config.json is kept in what does not
            describe the network; None writes the description and the weights alone.
        max_shard_size: bytes of tensors in a file, see `hf.shard_files.parse_size`.

    Raises:
        UserError: LLaDA's network cannot be this one, `folder` holds something, or the disk refuses.
    """
    fields = {} if like is None else read_config(like)
    fields |= llada_of_architecture(architecture)
    stored = source("final_norm.weight").dtype if dtype is None else dtype
    fields["torch_dtype"] = str(stored).removeprefix("torch.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give another folder or move what stands there.")

    entries = [
        TensorEntry(its_name, stored, (shape[0] // len(llada_names(name)), *shape[1:]))
        for name, shape in canonical_shapes(architecture).items()
        for its_name in llada_names(name)
    ]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in canonical_shapes(architecture):
            theirs = llada_names(name)
            yield from zip(theirs, source(name).chunk(len(theirs)), strict=True)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            write_shards(fresh, tensors(), entries, parse_size(max_shard_size))
            (fresh / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            for path in () if like is None else sorted(like.iterdir()):
                if path.is_file() and _is_kept(path.name):
                    shutil.copyfile(path, fresh / path.name)
            fresh.rename(folder)
    except OSError as error:
        raise UserError(
            f"The model could not be written to {folder} ({error}); free space or correct the permissions, and export "
            "again."
        ) from error


def _is_kept(name: str) -> bool:
    """Whether a file of a folder is neither its weights nor its description."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
    return name != CONFIG_FILE and not name.startswith(".") and not name.endswith(weights)
