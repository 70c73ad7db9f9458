"""Exporting the student of a run as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from imdm_scale.data.place import Place
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.hf.export import RANKS, config_from_architecture, save_folder
from imdm_scale.hf.shard_files import MAX_SHARD_SIZE
from imdm_scale.parallel.engine import Student
from imdm_scale.parallel.shards import whole_weights


def export_model(
    student: Student,
    tokenizer: Tokenizer,
    bos_id: int | None,
    folder: Path,
    place: Place | None = None,
    order: TokenOrder | None = None,
    facts: Mapping[str, object] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write the network's present weights, its code and its tokenizer. Collective over the student's ranks.

    The first of them writes each tensor as soon as it is whole; no rank ever holds more of the network.

    Args:
        student: the network.
        tokenizer: what its ids mean.
        bos_id: the id with which every block of its data begins, and so every text that it writes; None where
            there is none such.
        folder: where to; an earlier export there is replaced.
        place: where the run stands in its data, which is written beside the weights; None writes none.
        order: in which the model draws its tokens; None is the order of ids.
        facts: how the model was made, for its card.
        max_shard_size: bytes of tensors in a file, see `save_folder`.

    Raises:
        UserError: on the rank that writes, where the disk refuses; what was saved before is untouched.
    """
    layout, everyone = student.groups.layout, student.groups.everyone
    dtype = student.stages[0].config.params_dtype
    tensors = whole_weights(student, layout, student.architecture, dtype, student.device, everyone)
    if dist.get_rank() == layout.ranks[0]:
        order = TokenOrder() if order is None else order
        ranks = [] if order.rank_V is None else [(RANKS, order.rank_V)]
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
            save_folder(
                chain(ranks, tensors),
                config,
                folder,
                sorted(Path(scratch).iterdir()),
                dtype,
                max_shard_size,
                facts,
            )
    else:
        for _ in tensors:
            pass  # their parts have gone to the writer
    dist.barrier(everyone)
