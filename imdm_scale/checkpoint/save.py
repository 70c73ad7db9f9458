"""Exporting the student of a run as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from imdm_scale.checkpoint.weights import gather_weights
from imdm_scale.data.tokenizer import FILE_NAME, Tokenizer
from imdm_scale.hf.export import config_from_architecture, save_folder
from imdm_scale.parallel.engine import ModelEngine


def export_model(model: ModelEngine, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the network's present weights, its code and its tokenizer. Collective; rank 0 writes.

    Raises:
        UserError: on rank 0, where the disk refuses; what was saved before is untouched.
    """
    is_writer = dist.get_rank() == 0
    weights = {name: whole for name, whole in gather_weights(model) if is_writer}
    if is_writer:
        config = config_from_architecture(
            model.architecture,
            tokenizer_fingerprint=tokenizer.fingerprint,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
        with TemporaryDirectory() as scratch:
            tokenizer.save(Path(scratch))
            save_folder(weights, config, folder, [Path(scratch) / FILE_NAME])
    dist.barrier()
