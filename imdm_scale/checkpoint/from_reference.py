"""A checkpoint of MDLM, SDTT or IMDM as an exported model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from imdm_scale.checkpoint.averaged import averaged_tensors
from imdm_scale.checkpoint.mdlm import FoldedNetwork, folded_network
from imdm_scale.checkpoint.reference_dit import load_reference, shape_of
from imdm_scale.checkpoint.reference_file import ReferenceFile, read_reference
from imdm_scale.checkpoint.self_check import BOUNDS, check
from imdm_scale.checkpoint.verify import record_of
from imdm_scale.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.provenance import versions
from imdm_scale.hf.export import DTYPES, config_from_architecture, export_source, load_folder
from imdm_scale.hf.shard_files import MAX_SHARD_SIZE

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Choices:
    """What the user may say of a checkpoint; None is what the file says."""

    averaged: bool = False
    num_heads: int | None = None
    softcap: float | None = None
    length: int | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    max_shard_size: int | str = MAX_SHARD_SIZE
    check: bool = True


def from_reference(checkpoint: Path, out: Path, choices: Choices, say: Callable[[str], None]) -> None:
    """Converts `checkpoint` into the folder `out`, and compares the two networks' logits.

    Args:
        checkpoint: a file or a folder, see `read_reference`.
        say: prints a line.

    Raises:
        UserError: the checkpoint cannot be read or converted, a choice contradicts it, the disk refuses, or the
            written model computes something else.
    """
    file = read_reference(checkpoint)
    tokenizer = _tokenizer_of(checkpoint, choices.tokenizer)
    network, tensors = _folded(file, choices, None if tokenizer is None else tokenizer.mask_id)
    shape = network.architecture
    if tokenizer is not None and tokenizer.vocab_size != shape.vocab_size:
        raise UserError(
            f"--tokenizer has {tokenizer.vocab_size} ids with its mask, but {checkpoint} has {shape.vocab_size}; give "
            "the tokenizer that the model was trained with."
        )
    stored = tensors["vocab_embed.embedding"].dtype
    dtype = DTYPES[choices.dtype] if choices.dtype else (stored if stored in BOUNDS else torch.float32)

    say(f"{checkpoint}: {_described(network)}")
    assumed = _assumed(file, choices, network, tokenizer)
    for line in assumed:
        say(f"  the file does not tell: {line}")
    if file.averaged is not None and not choices.averaged:
        say("  its averaged weights are not used; --ema takes them")
    if file.unused:
        say(f"  not used: {', '.join(file.unused)}")

    config = config_from_architecture(
        shape,
        tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint,
        bos_token_id=None if tokenizer is None else tokenizer.bos_id,
        eos_token_id=None if tokenizer is None else tokenizer.eos_id,
    )
    facts = {
        "made by": "conversion of a reference checkpoint (tools/convert.py from-reference)",
        "source": checkpoint.name,
        "SHA-256 of the source": _sha256(checkpoint),
        "weights": "moving averages" if choices.averaged else "as trained",
        "updates": file.updates,
        "versions": versions(),
    }
    with TemporaryDirectory() as scratch:
        if tokenizer is not None:
            tokenizer.save(Path(scratch))
        export_source(
            network.weight,
            config,
            out,
            tokenizer_files=sorted(Path(scratch).iterdir()),
            facts=facts,
            dtype=dtype,
            max_shard_size=choices.max_shard_size,
        )
    say(f"written to {out} as {str(dtype).removeprefix('torch.')}")
    if choices.check:
        reference = load_reference(tensors, shape_of(tensors, shape.num_heads, shape.attention_softcap))
        error = check(load_folder(out), reference, BOUNDS[dtype], out)
        say(f"checked: logits differ by at most {error:.1e} of the largest (allowed {BOUNDS[dtype]:.0e})")


def _folded(
    file: ReferenceFile, choices: Choices, mask_token_id: int | None
) -> tuple[FoldedNetwork, dict[str, Tensor]]:
    """The network, and the source's tensors that it is folded from."""
    softcap = _agreed("--softcap", choices.softcap, file, "model.softcap", "softcap") or 0.0
    num_heads = _agreed("--num-heads", choices.num_heads, file, "model.n_heads", "n_heads")
    length = _agreed("--length", choices.length, file, "model.length", "model_length")

    def fold(tensors: dict[str, Tensor]) -> FoldedNetwork:
        return folded_network(
            tensors,
            num_heads=None if num_heads is None else int(num_heads),
            mask_token_id=mask_token_id,
            attention_softcap=max(0.0, softcap),  # the reference's -1 is none
            length=int(length or DEFAULT_LENGTH),
        )

    network, tensors = fold(file.tensors), file.tensors
    if choices.averaged:
        tensors = averaged_tensors(file, shape_of(tensors, network.architecture.num_heads))
        network = fold(tensors)
    kind, scale = file.setting("algo.noise_type"), file.setting("algo.noise_scale")
    architecture = replace(
        network.architecture,
        noise_kind="normal" if kind == "randn" else "uniform",
        noise_scale=float(scale) if isinstance(scale, int | float) else 1.0,
    )
    return replace(network, architecture=architecture), tensors


def _agreed(flag: str, given: float | None, file: ReferenceFile, *names: str) -> float | None:
    """What the flag or the file's settings say, which must not contradict each other."""
    told = file.setting(*names)
    if told is not None and not isinstance(told, int | float):
        raise UserError(f"{names[0]} is {told!r} in the settings of {file.path}, but must be a number.")
    if given is not None and told is not None and given != told:
        raise UserError(f"{flag} is {given:g}, but {file.path} was trained with {told:g}; leave {flag} out.")
    return told if given is None else given


def _tokenizer_of(checkpoint: Path, given: str | None) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer(given, setting="--tokenizer", allow_hub=True)
    if checkpoint.is_dir() and holds_tokenizer(checkpoint):
        return load_tokenizer(checkpoint, setting="--checkpoint")
    return None


def _described(network: FoldedNetwork) -> str:
    shape = network.architecture
    kind = f"IMDM with noise of {shape.noise_dim} dimensions" if shape.noise_dim else "MDLM"
    if shape.num_masks:
        kind = f"IMDM with {shape.num_masks} masks"
    extras = [" with q/k norm"] if shape.qk_norm else []
    extras += [f" with soft cap {shape.attention_softcap:g}"] if shape.attention_softcap else []
    return (
        f"{kind}, {shape.num_layers} layers of width {shape.hidden_size}, {shape.num_heads} heads"
        f"{' and'.join(extras)}, {shape.vocab_size} ids, {shape.num_parameters():,} parameters"
    )


def _assumed(
    file: ReferenceFile, choices: Choices, network: FoldedNetwork, tokenizer: Tokenizer | None
) -> list[str]:
    """What was taken for granted, in words."""
    shape = network.architecture
    lines = []
    if choices.length is None and file.setting("model.length", "model_length") is None:
        lines.append(f"length {shape.length} (--length)")
    if choices.softcap is None and not file.settings:
        lines.append("no soft cap of the attention scores (--softcap)")
    if file.setting("time_conditioning", "algo.time_conditioning") is None:
        lines.append("time conditioning off, as in every published MDLM, SDTT and IMDM")
    if shape.noise_dim and not shape.num_masks and file.setting("algo.noise_type") is None:
        lines.append("noise uniform on [-1, 1], IMDM's default")
    if tokenizer is None:
        lines.append(
            f"mask token {shape.mask_token_id}, the last id, and no tokenizer beside it (--tokenizer)"
        )
    return lines


def _sha256(path: Path) -> str | None:
    """Of a file; a folder has none."""
    if path.is_dir():
        return None
    return record_of(path).sha256
