"""Reading the checkpoints of MDLM, SDTT and IMDM, whatever they were saved as.

A Lightning checkpoint (`state_dict`, `ema`, `hyper_parameters`, ...), a bare state dict of torch.save, a .safetensors
file, or a folder of the Hugging Face hub: config.json with the weights in one file or several. Nothing in a file is
executed (`inert.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from imdm_scale.checkpoint.inert import load_inert, plain
from imdm_scale.checkpoint.mdlm import PREFIX, without_prefix
from imdm_scale.config.model_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from imdm_scale.config.nearest import near_files
from imdm_scale.errors import UserError
from imdm_scale.hf.weight_files import open_files, open_weights

TORCH_FILE = "pytorch_model.bin"
NOT_SUBS = ("sedd", "d3pm", "ar", "score", "mean")
"""MDLM's and IMDM's other parameterizations, which read the same network's output in other ways."""


@dataclass(frozen=True)
class ReferenceFile:
    """What a checkpoint holds."""

    path: Path
    tensors: dict[str, Tensor]
    """The backbone's, without the prefix `backbone.`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The configuration that was saved with it, as plain data; empty where there is none."""
    averaged: list[Tensor] | None = None
    """The moving averages of its parameters in their order; None where there are none."""
    noise_shapes: tuple[tuple[int, ...], ...] = ()
    """Of the noise schedule's tensors, which the averages may cover, too."""
    updates: int | None = None
    """How long it was trained, where the file says so."""
    unused: tuple[str, ...] = ()
    """What else is in the file, in words."""

    def setting(self, *names: str) -> Any:
        """The first of several dotted names that is set, at the top or below `config`; None if none is.

        An interpolation (`${...}`) counts as unset: only the trainer that wrote the file could resolve it.
        """
        for root in (self.settings, self.settings.get("config")):
            for name in names:
                value: Any = root
                for part in name.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                if value is not None and not str(value).startswith("${"):
                    return value
        return None


def read_reference(path: Path) -> ReferenceFile:
    """The checkpoint at `path`.

    Raises:
        UserError: there is none, it cannot be read, or its network cannot be a time-independent masked diffusion
            model.
    """
    if not path.exists():
        raise UserError(f"--checkpoint is {path}, which does not exist; {near_files(path)}")
    if path.is_dir():
        found = _read_folder(path)
    elif path.suffix == ".safetensors":
        found = _of_tensors(path, dict(open_files(path).tensors()), {})
    else:
        found = _read_torch_file(path)
    _refuse_other_networks(found)
    return found


def _read_folder(folder: Path) -> ReferenceFile:
    settings: dict[str, Any] = {}
    if (folder / CONFIG_FILE).is_file():
        try:
            settings = dict(json.loads((folder / CONFIG_FILE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder / CONFIG_FILE} cannot be read ({error}); download the model again."
            ) from None
    if settings.get("model_type") == "imdm":
        raise UserError(
            f"--checkpoint {folder} is a model that this package exported; give a checkpoint of MDLM, SDTT or IMDM."
        )
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return _of_tensors(folder, dict(open_weights(folder).tensors()), settings)
    index = folder / f"{TORCH_FILE}.index.json"
    names = [TORCH_FILE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{index} cannot be read as an index of weights; download the model again."
            ) from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"--checkpoint {folder} has no {name}; give a folder with {WEIGHTS_FILE} or {TORCH_FILE}, in one file "
                "or several with an index, or the checkpoint's file itself."
            )
        tensors |= _tensors_of(folder / name, load_inert(folder / name))
    return _of_tensors(folder, tensors, settings)


def _read_torch_file(path: Path) -> ReferenceFile:
    content = load_inert(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        return _of_tensors(path, _tensors_of(path, content), {})
    tensors = _tensors_of(path, content["state_dict"])
    settings, average = plain(content.get("hyper_parameters")), content.get("ema")
    averaged = average.get("shadow_params") if isinstance(average, dict) else None
    if not isinstance(averaged, list) or not all(isinstance(tensor, Tensor) for tensor in averaged):
        averaged = None
    used = {"state_dict", "hyper_parameters", "global_step"} | ({"ema"} if averaged else set())
    updates = content.get("global_step")
    return _of_tensors(
        path,
        tensors,
        settings if isinstance(settings, dict) else {},
        averaged=averaged,
        updates=updates if isinstance(updates, int) else None,
        unused=tuple(str(name) for name in content if name not in used),
    )


def _tensors_of(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{path} holds a {type(content).__name__} where a state dict is wanted; give a Lightning checkpoint or a "
            "saved state dict."
        )
    wrong = [name for name, tensor in content.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise UserError(
            f"{path} is no state dict: its {wrong[0]} is no tensor; give a Lightning checkpoint or a saved state dict."
        )
    return dict(content)


def _of_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    unused: tuple[str, ...] = (),
    **more: Any,
) -> ReferenceFile:
    """Keeps the backbone's tensors; the others are counted by the module that they belong to."""
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)} or tensors
    others = [name for name in tensors if name not in backbone]
    counts = Counter(name.partition(".")[0] for name in others)
    noise = tuple(tuple(tensors[name].shape) for name in others if name.startswith("noise."))
    return ReferenceFile(
        path,
        dict(without_prefix(backbone)),
        settings,
        noise_shapes=noise,
        unused=(*(f"{count} tensors of {module}" for module, count in counts.items()), *unused),
        **more,
    )


def _refuse_other_networks(found: ReferenceFile) -> None:
    if found.setting("time_conditioning", "algo.time_conditioning") is True:
        raise UserError(
            f"{found.path} was trained with time_conditioning, so its adaLN depends on the noise level and does not "
            "fold into constants; only networks with time_conditioning off can be converted."
        )
    parameterization = found.setting("algo.parameterization", "parameterization")
    if parameterization in NOT_SUBS:
        raise UserError(
            f"{found.path} was trained with the parameterization {parameterization}; only subs, MDLM's, can be "
            "converted."
        )
