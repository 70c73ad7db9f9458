"""Exported folders, which transformers' auto classes load (trust_remote_code=True) without this package.

A folder holds config.json, the weights (one safetensors file or several with an index), the tokenizer's files, the
code that the model needs and a card. The code is flattened from `imdm_scale.hf` and `imdm_scale.diffusion` when the
folder is written, so that the repository keeps one copy of it. The same weights and configuration give the same bytes.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.model_folder import missing_files
from imdm_scale.errors import UserError

from .configuration_imdm import ImdmConfig
from .model_card import CARD_FILE, model_card
from .modeling_imdm import ImdmForMaskedLM
from .safetensors_writer import TensorEntry
from .shard_files import MAX_SHARD_SIZE, parse_size, write_shards
from .weight_files import open_weights

RANKS = "vocabulary_rank"
"""Name of the ranks of the vocabulary among the tensors; absent where the order is that of ids."""
AUTO_MAP = {
    "AutoConfig": "configuration_imdm.ImdmConfig",
    "AutoModelForMaskedLM": "modeling_imdm.ImdmForMaskedLM",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precisions by the names that settings and flags have for them."""
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
    weights: ImdmForMaskedLM | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ImdmConfig,
    out_dir: str | os.PathLike[str],
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write a model as a folder that transformers loads on its own.

    The folder is complete or absent: it is written beside its place under a temporary name and then renamed.
    An earlier export at the same place is kept until the new one is whole, then replaced.

    Args:
        weights: the model; or its tensors under `ImdmForMaskedLM`'s names, as a mapping or as pairs in the order of
            `weight_shapes(config)`. Of pairs only one tensor is in memory at a time.
        config: its configuration, the tokenizer's special ids included.
        out_dir: the folder to write; its parents are made.
        tokenizer_files: files copied into the folder under their own names.
        dtype: type to store the weights in; None keeps that of the first. Integers keep theirs.
        max_shard_size: bytes of tensors in a file, as a number or such as "5GB"; more are dealt to several files.
        facts: how the model was made, for its card.

    Returns:
        `out_dir` as a path.

    Raises:
        UserError: `out_dir` exists and is not an exported model, the disk refuses (full, no permission), or
            `max_shard_size` is no size.
        ValueError: the tensors are not those of the configured network.
    """
    out_dir = Path(out_dir)
    max_bytes = parse_size(max_shard_size)
    shapes = weight_shapes(config)
    if isinstance(weights, ImdmForMaskedLM):
        weights = weights.state_dict()
    if isinstance(weights, Mapping):
        by_name = weights
        check_shapes({name: tensor.shape for name, tensor in by_name.items()}, shapes)
        weights = ((name, by_name[name]) for name in shapes)
    if out_dir.exists() and not is_export(out_dir):
        raise UserError(
            f"{out_dir} exists and is not an exported model; give another folder or move what stands there."
        )
    dtype, weights = _stored_type(weights, dtype)
    entries = [
        TensorEntry(name, torch.int64 if name == RANKS else dtype, shape) for name, shape in shapes.items()
    ]
    config = copy.deepcopy(config)
    config.auto_map = AUTO_MAP
    config.architectures = [ImdmForMaskedLM.__name__]
    config.dtype = dtype
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            hashes = write_shards(fresh, weights, entries, max_bytes)
            config.save_pretrained(fresh)
            write_generation_config(fresh, config)
            (fresh / CARD_FILE).write_text(model_card(facts or {}, config, hashes), encoding="utf-8")
            for name, source in travelling_code().items():
                (fresh / name).write_text(source, encoding="utf-8")
            for file in tokenizer_files:
                shutil.copyfile(file, fresh / Path(file).name)
            replace_folder(fresh, out_dir, Path(scratch) / "old")
    except OSError as error:
        raise UserError(
            f"The model could not be written to {out_dir} ({error}); nothing there was changed. "
            "Free space or correct the permissions, and export again."
        ) from error
    return out_dir


def export_source(
    source: Callable[[str], Tensor],
    config: ImdmConfig,
    out_dir: Path,
    *,
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
    facts: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """`save_folder` of weights that are read or made when they are asked for, whatever holds them.

    Args:
        source: name -> whole tensor, for every name of `weight_shapes(config)`; asked once for each, in that order.

    Raises:
        UserError, ValueError: as `save_folder`.
    """
    pairs = ((name, source(name)) for name in weight_shapes(config))
    return save_folder(pairs, config, out_dir, tokenizer_files, dtype, max_shard_size, facts)


def weight_shapes(config: ImdmConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor, in file order: `vocabulary_rank` where there is one, then the weights."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ImdmForMaskedLM(config).state_dict().items()}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the names and shapes are those of the configured network."""
    wrong = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors do not fit the configuration, among them {name}: "
            f"shape {found.get(name)}, expected {expected.get(name)}"
        )


def write_generation_config(folder: Path, config: ImdmConfig) -> None:
    """Writes generation_config.json with the special ids that are known; none where none is."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if known:
        GenerationConfig(**known).save_pretrained(folder)


def _stored_type(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> tuple[torch.dtype, Iterable[tuple[str, Tensor]]]:
    """The type to store floats in, that of the first where `dtype` is None, and all the weights."""
    stream = iter(weights)
    seen: list[tuple[str, Tensor]] = []
    while dtype is None:
        pair = next(stream, None)
        if pair is None:
            raise ValueError("there are no weights to save")
        seen.append(pair)
        if pair[1].is_floating_point():
            dtype = pair[1].dtype

    def all_weights() -> Iterator[tuple[str, Tensor]]:
        while seen:
            yield seen.pop(0)
        yield from stream

    return dtype, all_weights()


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
    if missing := missing_files(folder):
        raise UserError(
            f"{folder} is not an exported model: it has no {missing[0]}; give the folder that holds it."
        )
    try:
        description, _ = ImdmConfig.get_config_dict(folder)
        if description.get("model_type") != ImdmConfig.model_type:
            raise ValueError(
                f"its model_type is {description.get('model_type')!r}, not {ImdmConfig.model_type!r}"
            )
        config = ImdmConfig.from_dict(description)
        files = open_weights(folder)
        check_shapes(files.shapes, weight_shapes(config))
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be loaded as an IMDM ({error}); export the model again.") from error
    with torch.device("meta"):
        model = ImdmForMaskedLM(config)
    model.load_state_dict(dict(files.tensors()), assign=True)
    return model.eval()
