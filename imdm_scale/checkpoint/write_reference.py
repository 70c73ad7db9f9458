"""Writing an exported model for the reference code, and comparing the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from imdm_scale.checkpoint.inert import load_inert
from imdm_scale.checkpoint.mdlm import without_prefix
from imdm_scale.checkpoint.reference_dit import load_reference
from imdm_scale.checkpoint.self_check import BOUNDS, check
from imdm_scale.checkpoint.to_reference import check_expressible, dit_shape, reference_tensors
from imdm_scale.config.architecture import Architecture
from imdm_scale.data.durable import partial_path, put_in_place, sync
from imdm_scale.errors import UserError
from imdm_scale.hf.export import architecture_from_config, load_folder
from imdm_scale.hf.safetensors_writer import SafetensorsWriter, TensorEntry
from imdm_scale.hf.weight_files import open_files

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def to_reference(model_folder: Path, out: Path, compare: bool, say: Callable[[str], None]) -> None:
    """Writes a state dict that the reference's training module loads with strict=True, in the model's own type.

    Args:
        model_folder: an exported model.
        out: the file: safetensors by that suffix, else torch.save's.
        compare: whether to compare the logits of both.
        say: prints a line.

    Raises:
        UserError: the model cannot be read, is not what the reference can build, the disk refuses, or the written
            network computes something else.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(
            f"--out is {out}, but a state dict ends with one of {', '.join(SUFFIXES)}; rename it."
        )
    model = load_folder(model_folder)
    architecture = architecture_from_config(model.config)
    check_expressible(architecture, model.config.vocabulary_order)
    weights = model.state_dict()
    makers = reference_tensors(architecture, weights.__getitem__)
    partial = partial_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".safetensors":
            _write_safetensors(partial, makers)
        else:
            torch.save({name: make() for name, make in makers.items()}, partial)
            sync(partial)
        put_in_place(out)
    except (OSError, RuntimeError) as error:  # torch.save makes RuntimeErrors of a full disk
        raise UserError(
            f"{out} could not be written ({error}); free space or correct the permissions, and convert again."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    say(f"{out}: {len(makers)} tensors for {_settings(architecture)}")
    if compare:
        read = dict(open_files(out).tensors()) if out.suffix == ".safetensors" else load_inert(out)
        reference = load_reference(without_prefix(read), dit_shape(architecture))
        bound = BOUNDS[torch.float32]  # nothing was rounded, whatever the type
        difference = check(model, reference, bound, out)
        say(f"checked: logits differ by at most {difference:.1e} of the largest (allowed {bound:.0e})")


def _write_safetensors(path: Path, makers: dict[str, Callable[[], Tensor]]) -> None:
    """The float32 rotary buffer goes first, since wider types must."""
    names = sorted(makers, key=lambda name: not name.endswith("inv_freq"))
    entries = []
    for name in names:
        tensor = makers[name]()
        entries.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape)))
    with SafetensorsWriter(path, entries) as writer:
        for name in names:
            writer.write(name, makers[name]())


def _settings(architecture: Architecture) -> str:
    """How to configure the reference code for the model, in its own names."""
    settings: dict[str, object] = {
        "model.hidden_size": architecture.hidden_size,
        "model.n_blocks": architecture.num_layers,
        "model.n_heads": architecture.num_heads,
        "model.length": architecture.length,
        "vocab_size": architecture.vocab_size,
    }
    if architecture.noise_dim:
        settings |= {"model.is_imdm": True}
    if architecture.num_masks:
        settings |= {"algo.num_mask": architecture.num_masks}
    elif architecture.noise_dim:
        settings |= {
            "model.noise_dim": architecture.noise_dim,
            "algo.noise_type": "randn" if architecture.noise_kind == "normal" else "rand",
            "algo.noise_scale": architecture.noise_scale,
        }
    if architecture.qk_norm:
        settings |= {"model.qk_norm": True}
    if architecture.attention_softcap:
        settings |= {"model.softcap": architecture.attention_softcap}
    return "DIT with " + " ".join(f"{name}={value}" for name, value in settings.items())
