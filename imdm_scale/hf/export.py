"""Exported folders, which transformers' auto classes load (trust_remote_code=True) without this package.

A folder holds config.json, model.safetensors, the tokenizer's files and the code that the model needs. The
code is flattened from `imdm_scale.hf` and `imdm_scale.diffusion` when the folder is written, so that the
repository keeps one copy of it.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.errors import UserError

from .configuration_imdm import ImdmConfig
from .modeling_imdm import ImdmForMaskedLM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RANKS = "vocabulary_rank"
"""Name of the ranks of the vocabulary among the tensors; absent where the order is that of ids."""
AUTO_MAP = {
    "AutoConfig": "configuration_imdm.ImdmConfig",
    "AutoModelForMaskedLM": "modeling_imdm.ImdmForMaskedLM",
}
PACKAGE = Path(__file__).resolve().parent.parent


def config_from_architecture(
    architecture: Architecture,
    *,
    tokenizer_fingerprint: str | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    vocabulary_order: str = "identity",
) -> ImdmConfig:
    """The transformers configuration of a network, with what a folder says of its tokenizer and of the order in
    which its tokens are drawn."""
    return ImdmConfig(
        **{field.name: getattr(architecture, field.name) for field in fields(Architecture)},
        tokenizer_fingerprint=tokenizer_fingerprint,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        vocabulary_order=vocabulary_order,
    )


def architecture_from_config(config: ImdmConfig) -> Architecture:
    """The network that a transformers configuration describes."""
    return Architecture(**{field.name: getattr(config, field.name) for field in fields(Architecture)})


def travelling_code() -> dict[str, str]:
    """File name -> source of `modeling_imdm.py` and of what it imports of this package, transitively.

    The files lie flat: `from ..diffusion.X import` becomes `from .X import`.

    Raises:
        ValueError: a file imports the package in another way and so could not travel.
    """
    code: dict[str, str] = {}
    pending = [PACKAGE / "hf" / "modeling_imdm.py"]
    while pending:
        path = pending.pop()
        source = path.read_text(encoding="utf-8")
        for folder, module in re.findall(r"^from \.(\.diffusion\.)?(\w+) import", source, flags=re.MULTILINE):
            needed = (PACKAGE / "diffusion" if folder else path.parent) / f"{module}.py"
            if needed.name not in code and needed not in pending:
                pending.append(needed)
        flat = re.sub(r"^from \.\.diffusion\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
        if astray := re.search(
            r"^\s*(from \.\..*|from imdm_scale.*|import imdm_scale.*)$", flat, flags=re.MULTILINE
        ):
            raise ValueError(f"{path.name} cannot travel with a checkpoint: it has {astray.group(1)!r}")
        code[path.name] = flat
    return code


def save_folder(
    model_or_state_dict: ImdmForMaskedLM | Mapping[str, Tensor],
    config: ImdmConfig,
    out_dir: str | os.PathLike[str],
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model as a folder that transformers loads on its own.

    The folder is complete or absent: it is written beside its place under a temporary name and then renamed.
    An earlier export at the same place is kept until the new one is whole, then replaced.

    Args:
        model_or_state_dict: the model, or its tensors under `ImdmForMaskedLM`'s names.
        config: its configuration, the tokenizer's special ids included.
        out_dir: the folder to write; its parents are made.
        tokenizer_files: files copied into the folder under their own names.
        dtype: type to store the weights in; None keeps each tensor's, as integers always are.

    Returns:
        `out_dir` as a path.

    Raises:
        UserError: `out_dir` exists and is not an exported model, or the disk refuses (full, no permission).
        ValueError: the tensors are not those of the configured network.
    """
    out_dir = Path(out_dir)
    if isinstance(model_or_state_dict, ImdmForMaskedLM):
        model_or_state_dict = model_or_state_dict.state_dict()
    check_tensors(model_or_state_dict, config)
    tensors = {}
    for name, tensor in model_or_state_dict.items():
        stored = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        tensors[name] = tensor.detach().to(device="cpu", dtype=stored).contiguous()
    config = copy.deepcopy(config)
    config.auto_map = AUTO_MAP
    config.architectures = [ImdmForMaskedLM.__name__]
    config.dtype = tensors["token_embedding.weight"].dtype

    if out_dir.exists() and not is_export(out_dir):
        raise UserError(
            f"{out_dir} exists and is not an exported model; give another folder or move what stands there."
        )
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
            (fresh / WEIGHTS_FILE).chmod(0o644)  # safetensors leaves it to its owner alone
            config.save_pretrained(fresh)
            for name, source in travelling_code().items():
                (fresh / name).write_text(source, encoding="utf-8")
            for file in tokenizer_files:
                shutil.copyfile(file, fresh / Path(file).name)
            replace_folder(fresh, out_dir, Path(scratch) / "old")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The model could not be written to {out_dir} ({error}); nothing there was changed. "
            "Free space or correct the permissions, and export again."
        ) from error
    return out_dir


def check_tensors(tensors: Mapping[str, Tensor], config: ImdmConfig) -> None:
    """Raise ValueError unless the names and shapes are those of the configured network."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in ImdmForMaskedLM(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors do not fit the configuration, among them {name}: "
            f"shape {found.get(name)}, expected {expected.get(name)}"
        )


def is_export(folder: Path) -> bool:
    """Whether a path is a folder that `save_folder` may replace: an exported model, or nothing at all."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / "modeling_imdm.py").is_file())


def replace_folder(fresh: Path, place: Path, aside: Path) -> None:
    """Move `fresh` to `place`; what stood there goes to `aside`, and comes back if the move fails."""
    try:
        if place.exists():
            place.rename(aside)
        fresh.rename(place)
    except BaseException:  # an interrupt between the two renames, too, must not cost the earlier export
        if aside.exists() and not place.exists():
            aside.rename(place)
        raise


def load_folder(folder: str | os.PathLike[str]) -> ImdmForMaskedLM:
    """The model of an exported folder, by this package's own code, in evaluation mode and the stored type.

    Raises:
        UserError: the folder or one of its files is missing, damaged, or not an IMDM.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is not an exported model: it has no {name}; give the folder that holds it."
            )
    try:
        description, _ = ImdmConfig.get_config_dict(folder)
        if description.get("model_type") != ImdmConfig.model_type:
            raise ValueError(
                f"its model_type is {description.get('model_type')!r}, not {ImdmConfig.model_type!r}"
            )
        config = ImdmConfig.from_dict(description)
        tensors = load_file(folder / WEIGHTS_FILE)
        check_tensors(tensors, config)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded as an IMDM ({error}); export the model again.") from error
    with torch.device("meta"):
        model = ImdmForMaskedLM(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()
