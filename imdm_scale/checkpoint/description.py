"""What a checkpoint holds beside numbers, so that it can be exported without the run: configuration and tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.data.place import Place
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.export import RANKS, config_from_architecture

MODEL = "model"
"""The folder with config.json and the order of the vocabulary."""
TOKENIZER = "tokenizer"
"""The folder with the tokenizer's files."""
RANKS_FILE = f"{RANKS}.safetensors"


def write_description(
    folder: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    bos_id: int | None,
    order: TokenOrder,
    place: Place,
) -> None:
    """Write `model/`, `tokenizer/` and `data.json` into the folder of a run's checkpoint.

    Args:
        bos_id: the id with which every block of the data begins; None where there is none such.
        order: in which the model draws its tokens.
        place: where the run is in its data.
    """
    config = config_from_architecture(
        architecture,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_token_id=bos_id,
        eos_token_id=tokenizer.eos_id,
        vocabulary_order=order.name,
    )
    write_model(folder, config, order.rank_V)
    tokenizer.save(folder / TOKENIZER)
    place.write(folder)


def write_model(
    folder: Path, config: ImdmConfig, rank_V: Tensor | None, tokenizer_files: Iterable[Path] = ()
) -> None:
    """Write `model/`, and `tokenizer/` with the given files, into the folder of a checkpoint.

    Args:
        rank_V: ranks of the vocabulary, None in the order of ids.
    """
    for name in (MODEL, TOKENIZER):
        (folder / name).mkdir()
    config.save_pretrained(folder / MODEL)
    if rank_V is not None:
        save_file({RANKS: rank_V}, folder / MODEL / RANKS_FILE)
    for file in tokenizer_files:
        shutil.copyfile(file, folder / TOKENIZER / file.name)


def read_description(folder: Path) -> tuple[ImdmConfig, Tensor | None, list[Path]]:
    """The transformers configuration, the ranks of the vocabulary (None in the order of ids) and the tokenizer's files
    of a checkpoint that verifies."""
    config = ImdmConfig.from_pretrained(folder / MODEL)
    ranks = folder / MODEL / RANKS_FILE
    rank_V = load_file(ranks)[RANKS] if ranks.is_file() else None
    return config, rank_V, sorted((folder / TOKENIZER).iterdir())
