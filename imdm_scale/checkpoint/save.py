"""Exporting the student of a run as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from imdm_scale.data.place import Place
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.hf.export import RANKS, config_from_architecture, save_folder
from imdm_scale.parallel.engine import Student
from imdm_scale.parallel.shards import whole_weights


def export_model(
    student: Student,
    tokenizer: Tokenizer,
    bos_id: int | None,
    folder: Path,
    place: Place | None = None,
    order: TokenOrder | None = None,
) -> None:
    """Write the network's present weights, its code and its tokenizer. Collective over the student's ranks.

    The first of them writes.

    Args:
        student: the network.
        tokenizer: what its ids mean.
        bos_id: the id with which every block of its data begins, and so every text that it writes; None where
            there is none such.
        folder: where to; an earlier export there is replaced.
        place: where the run stands in its data, which is written beside the weights; None writes none.
        order: in which the model draws its tokens; None is the order of ids.

    Raises:
        UserError: on the rank that writes, where the disk refuses; what was saved before is untouched.
    """
    layout, everyone = student.groups.layout, student.groups.everyone
    dtype = student.stages[0].config.params_dtype
    tensors = whole_weights(student, layout, student.architecture, dtype, student.device, everyone)
    is_writer = dist.get_rank() == layout.ranks[0]
    weights = {name: whole.cpu() for name, whole in tensors if is_writer}
    if is_writer:
        order = TokenOrder() if order is None else order
        if order.rank_V is not None:
            weights[RANKS] = order.rank_V
        config = config_from_architecture(
            student.architecture,
            tokenizer_fingerprint=tokenizer.fingerprint,
            bos_token_id=bos_id,
            eos_token_id=tokenizer.eos_id,
            vocabulary_order=order.name,
        )
        with TemporaryDirectory() as scratch:
            tokenizer.save(Path(scratch))
            if place is not None:
                place.write(Path(scratch))
            save_folder(weights, config, folder, sorted(Path(scratch).iterdir()))
    dist.barrier(everyone)
