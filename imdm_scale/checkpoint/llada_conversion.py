"""LLaDA's folders as exported models, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from imdm_scale.checkpoint.llada import read_llada, write_llada
from imdm_scale.checkpoint.llada_reference import check_llada
from imdm_scale.checkpoint.self_check import BOUNDS
from imdm_scale.checkpoint.stored_model import locate_model, open_model
from imdm_scale.data.tokenizer import holds_tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.provenance import versions
from imdm_scale.hf.export import (
    DTYPES,
    architecture_from_config,
    config_from_architecture,
    export_source,
    load_folder,
)
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM


def from_llada(
    folder: Path,
    out: Path,
    dtype: str | None,
    max_shard_size: int | str,
    check: bool,
    say: Callable[[str], None],
) -> None:
    """Write the exported model `out` from LLaDA's folder.

    Of its embedding the tokenizer's ids are kept, where there is a tokenizer: the rows beyond them only round up the
    size.

    Args:
        dtype: fp32 or bf16; None keeps the source's.
        say: prints a line.

    Raises:
        UserError: the folder is not LLaDA's, of a kind that cannot be imported, or damaged; the disk refuses; or the
            written model computes something else.
    """
    tokenizer = load_tokenizer(folder, setting="--model") if holds_tokenizer(folder) else None
    architecture, source = read_llada(folder, None if tokenizer is None else tokenizer.vocab_size)
    config = config_from_architecture(
        architecture,
        tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint,
        bos_token_id=None if tokenizer is None else tokenizer.bos_id,
        eos_token_id=None if tokenizer is None else tokenizer.eos_id,
    )
    stored = DTYPES[dtype] if dtype else source("final_norm.weight").dtype
    with TemporaryDirectory() as scratch:
        if tokenizer is not None:
            tokenizer.save(Path(scratch))
        export_source(
            source,
            config,
            out,
            tokenizer_files=sorted(Path(scratch).iterdir()),
            facts={"made by": "conversion of LLaDA", "source": folder.name, "versions": versions()},
            dtype=stored,
            max_shard_size=max_shard_size,
        )
    say(f"{folder}: {architecture.num_parameters():,} parameters, written to {out} as {_name(stored)}")
    if check:
        say(_checked(check_llada(folder, load_folder(out).float()), stored, out))


def to_llada(
    model: str,
    out: Path,
    dtype: str | None,
    max_shard_size: int | str,
    like: Path | None,
    check: bool,
    say: Callable[[str], None],
) -> None:
    """Write LLaDA's folder `out` from an exported model or a checkpoint.

    Args:
        like: a LLaDA folder whose tokenizer, code and remaining configuration are taken over.

    Raises:
        UserError: LLaDA's network cannot be this one, the disk refuses, or the written model computes something else.
    """
    stored = open_model(locate_model(model, "--model"))
    architecture = architecture_from_config(stored.config)
    chosen = DTYPES[dtype] if dtype else None
    write_llada(out, architecture, stored.tensor, dtype=chosen, max_shard_size=max_shard_size, like=like)
    kept = chosen or stored.tensor("final_norm.weight").dtype
    say(f"{model}: written to {out} as {_name(kept)}")
    if check:
        source = ImdmForMaskedLM(stored.config)
        tensors: dict[str, Tensor] = {name: stored.tensor(name) for name in source.state_dict()}
        source.load_state_dict(tensors)
        say(_checked(check_llada(out, source.float().eval()), kept, out))


def _checked(error: float, dtype: torch.dtype, out: Path) -> str:
    if not error <= BOUNDS[dtype]:
        raise UserError(
            f"{out} was written, but its logits differ from the source's by {error:.1e} of the largest, more than "
            f"{BOUNDS[dtype]:.0e}; do not use it, and report this."
        )
    return f"checked: logits differ by at most {error:.1e} of the largest (allowed {BOUNDS[dtype]:.0e})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
