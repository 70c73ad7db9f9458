"""An exported model as an evaluation sees it, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.model_folder import CONFIG_FILE, missing_files
from imdm_scale.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.export import architecture_from_config
from imdm_scale.hf.weight_files import open_weights


@dataclass(frozen=True)
class ExportedModel:
    """What a folder says of itself."""

    folder: Path
    architecture: Architecture
    tokenizer: Tokenizer
    bos_id: int | None
    """Id that begins every text; None where texts have none such."""
    weights_sha256: str
    """Over all files of weights."""


def describe(folder: Path) -> ExportedModel:
    """The model of a folder.

    Raises:
        UserError: it is none, cannot be read, or its tokenizer is missing.
    """
    if missing := missing_files(folder):
        raise UserError(
            f"--model {folder} is not an exported model: it has no {missing[0]}; give the folder that holds it."
        )
    try:
        config = ImdmConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read ({error}); export the model again.") from None
    return ExportedModel(
        folder,
        architecture_from_config(config),
        tokenizer_of(folder, config),
        config.bos_token_id,
        open_weights(folder).sha256(),
    )


def tokenizer_of(folder: Path, config: ImdmConfig) -> Tokenizer:
    """The tokenizer beside a model, else the packaged one.

    Raises:
        UserError: the model was trained with another one.
    """
    has_tokenizer = holds_tokenizer(folder)
    tokenizer = load_tokenizer(folder if has_tokenizer else None, setting="--model")
    if config.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise UserError(
            f"--model {folder} was trained with another tokenizer than "
            f"{'the one beside it' if has_tokenizer else 'the packaged one'}; put the files of its own there."
        )
    return tokenizer
