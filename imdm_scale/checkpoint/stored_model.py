"""A model on the disk, whatever holds it: an exported folder, a checkpoint, a run, or the hub's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from imdm_scale.checkpoint.description import MODEL, TOKENIZER
from imdm_scale.checkpoint.manifest import AVERAGE, MASTER, Manifest
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.verify import candidates, newest_whole
from imdm_scale.config.model_folder import CONFIG_FILE, MANIFEST_FILE, STUDENT, is_hub_name, missing_files
from imdm_scale.data.huggingface_files import download
from imdm_scale.errors import UserError
from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.weight_files import open_weights

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
"""What is fetched of a model on the hub: no code."""


@dataclass(frozen=True)
class StoredModel:
    """None of its tensors is read yet."""

    folder: Path
    config: ImdmConfig
    shapes: dict[str, tuple[int, ...]]
    """Canonical name -> shape."""
    tensor: Callable[[str], Tensor]
    """Canonical name -> whole tensor."""
    tokenizer_folder: Path
    """Where its tokenizer's files are, if it has any."""
    sha256: Callable[[], str]
    """Of the weights: reads them all."""


def open_model(folder: Path, kind: str | None = None) -> StoredModel:
    """The model of an exported folder, or of a checkpoint that verifies.

    Args:
        kind: of a checkpoint's tensors; None takes the averages where there are any, else the master weights.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    if (folder / MANIFEST_FILE).is_file():
        return _of_checkpoint(folder, kind)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}; give the folder of an exported model.")
    config, files = _config(folder), open_weights(folder)
    return StoredModel(folder, config, files.shapes, files.tensor, folder, files.sha256)


def _of_checkpoint(folder: Path, kind: str | None) -> StoredModel:
    manifest = Manifest.read(folder)
    reader = CheckpointReader(folder, manifest)
    if kind is None:
        kind = AVERAGE if AVERAGE in manifest.kinds else MASTER
    if kind not in manifest.kinds:
        raise UserError(f"{folder} holds no {kind} weights, only {', '.join(manifest.kinds)}.")

    def sha256() -> str:
        """Of the files' hashes, which have been compared with the files."""
        names = "".join(f"{kind} {name} {record.sha256}\n" for name, record in sorted(manifest.files.items()))
        return hashlib.sha256(names.encode()).hexdigest()

    return StoredModel(
        folder,
        _config(folder / MODEL),
        reader.shapes,
        lambda name: reader.whole(kind, name),
        folder / TOKENIZER,
        sha256,
    )


def _config(folder: Path) -> ImdmConfig:
    try:
        fields, _ = ImdmConfig.get_config_dict(folder)
        if fields.get("model_type") != ImdmConfig.model_type:
            raise UserError(
                f"{folder} holds a model of type {fields.get('model_type')!r}, not {ImdmConfig.model_type!r}; convert "
                "it first: python tools/convert.py from-reference (MDLM, SDTT, IMDM) or from-llada."
            )
        return ImdmConfig.from_dict(fields)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read ({error}); export the model again.") from None


def locate_model(name: str, setting: str) -> Path:
    """The folder that a setting names: an exported model's, a checkpoint, a run's newest whole checkpoint (or its
    exported student, where it has no checkpoint), or the local copy of a name on the hub.

    Raises:
        UserError: there is none such.
    """
    path = Path(name)
    if path.is_dir():
        if not missing_files(path):
            return path
        if candidates(path):
            return newest_whole(path)[0]
        if not missing_files(path / STUDENT):
            return path / STUDENT
        raise UserError(
            f"{setting} is {name}, which holds no {missing_files(path)[0]} and no checkpoint; name the folder of an "
            "exported model or of a run, or a model on the hub."
        )
    if not is_hub_name(name):
        raise UserError(f"{setting} is {name}, which does not exist; name a folder, or a model on the hub.")
    return download(name, setting, HUB_FILES)
