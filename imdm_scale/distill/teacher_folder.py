"""Does an exported model fit the run that is to start from it?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from imdm_scale.assets import TEACHER
from imdm_scale.checkpoint.stored_model import StoredModel, open_model
from imdm_scale.config.architecture import Architecture
from imdm_scale.data.tokenizer import Tokenizer, holds_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.hf.export import architecture_from_config

FREE_TO_DIFFER = (
    "length",
    "noise_dim",
    "noise_kind",
    "noise_scale",
    "dropout",
    "initializer_range",
    "sampler",
)
"""A run may choose these anew: no weight of the plain network depends on them. Nor on Fourier features or
on a number of masks, where the model has none."""


def check_teacher_folder(folder: Path, architecture: Architecture, tokenizer: Tokenizer) -> None:
    """Compare what a folder says of itself with the run's network and tokenizer.

    Token ids are compared by the tokenizers' fingerprints: two vocabularies of one size may mean different
    words by the same id, which would train without complaint and teach nonsense.

    Raises:
        UserError: vocabulary or shape differ.
    """
    model = open_model(folder)
    config = model.config
    if config.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise UserError(
            f"the token ids of {folder} (tokenizer {config.tokenizer_fingerprint[:12]}, {config.vocab_size} ids) "
            f"and of this run (tokenizer {tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} ids) mean different "
            f"words; {_its_tokenizer(model)}, with data that are text or were prepared by that tokenizer, or "
            "choose a teacher of this tokenizer."
        )
    theirs = architecture_from_config(config)
    free = FREE_TO_DIFFER + tuple(
        name for name in ("noise_fourier", "num_masks") if not getattr(theirs, name)
    )
    for field in dataclasses.fields(Architecture):
        seen, wanted = getattr(theirs, field.name), getattr(architecture, field.name)
        if field.name not in free and seen != wanted:
            raise UserError(
                f"{field.name} is {seen} in the config.json of {folder} but {wanted} in this run, and the student "
                "starts as its teacher's copy; set model.* (or tokenizer.path) to match, or choose another folder."
            )


def _its_tokenizer(model: StoredModel) -> str:
    if model.folder == TEACHER:
        return "leave tokenizer.path null"
    folder = model.tokenizer_folder
    return f"set tokenizer.path={folder}" if holds_tokenizer(folder) else "set tokenizer.path to that model's"
