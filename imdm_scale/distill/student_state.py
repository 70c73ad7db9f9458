"""A student's training state out of its ranks and back, into any layout.

With as many tensor-parallel shards as were written, every rank reads its own pieces and nothing else. With
another number whole tensors are put together and cut anew, one at a time: each by one rank of a data-parallel group,
which tells the others. So the files are read once for every tensor-parallel rank, whatever the data-parallel size,
and no rank holds more than a tensor beside its own state.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.checkpoint.background import Snapshot
from imdm_scale.checkpoint.manifest import AVERAGE, MASTER, Manifest, StoredPiece
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.distill.ema import Ema
from imdm_scale.model.weights import placements
from imdm_scale.parallel import compat, optimizer
from imdm_scale.parallel.engine import Student
from imdm_scale.parallel.pieces import Piece, pieces_of

KINDS = (MASTER, *optimizer.MOMENTS, AVERAGE)


def buffers_of(student: Student, ema: Ema) -> dict[str, list[Tensor]]:
    """Kind -> this rank's flat tensors (views: writing changes the state)."""
    masters = compat.master_tensors(student.engine)
    optimizer.prepare_state(student.optimizer, masters)
    return {
        MASTER: compat.master_shards(student.engine),
        **{name: optimizer.moments(student.optimizer, masters, name) for name in optimizer.MOMENTS},
        AVERAGE: ema.shards,
    }


def snapshot(student: Student, ema: Ema) -> Snapshot:
    """Copies of what this rank has to save."""
    pieces = [piece for piece in pieces_of(student) if piece.is_first_copy]
    return Snapshot(
        [StoredPiece(piece.name, piece.tp, piece.start, piece.count) for piece in pieces],
        {
            kind: {piece.name: piece.of(buffers).to("cpu", torch.float32, copy=True) for piece in pieces}
            for kind, buffers in buffers_of(student, ema).items()
        },
    )


def counters(student: Student, ema: Ema) -> dict[str, int]:
    """What weights, running means and average have gone through."""
    masters = compat.master_tensors(student.engine)
    optimizer.prepare_state(student.optimizer, masters)
    return {
        "optimizer_updates": optimizer.num_updates(student.optimizer, masters),
        "ema_updates": ema.num_updates,
    }


def restore(student: Student, ema: Ema, folder: Path, manifest: Manifest) -> None:
    """Take weights, running means, average and their counters from a checkpoint that verifies, under whatever layout it
    was written. Collective over the student's ranks.

    Raises:
        DamagedCheckpoint: a file cannot be read.
    """
    with CheckpointReader(folder, manifest) as reader:
        read_tensors(student, ema, reader)
    ema.num_updates = int(manifest.progress["ema_updates"])
    masters = compat.master_tensors(student.engine)
    optimizer.set_num_updates(student.optimizer, masters, int(manifest.progress["optimizer_updates"]))


@torch.no_grad()
def read_tensors(student: Student, ema: Ema, reader: CheckpointReader) -> None:
    """Read what `buffers_of` names. Collective over the student's ranks."""
    pieces = {piece.name: piece for piece in pieces_of(student)}
    buffers = buffers_of(student, ema)
    if reader.manifest.tp == student.groups.tp_size:
        for piece in pieces.values():
            for kind in KINDS:
                found = reader.part(kind, piece.name, piece.tp, piece.start, piece.count)
                piece.of(buffers[kind]).copy_(found)
    else:
        _cut_anew(student, reader, pieces, buffers)
    compat.publish_master_shards(student.engine)


def _cut_anew(
    student: Student, reader: CheckpointReader, pieces: dict[str, Piece], buffers: dict[str, list[Tensor]]
) -> None:
    groups = student.groups
    names = [placement.name for stage in student.stages for _, placement in placements(stage)]
    for number, name in enumerate(names):
        owner = number % groups.dp_size
        for kind in KINDS:
            if groups.dp_rank == owner:
                whole = reader.whole(kind, name)
                shard = reader.placement(name).to_shard(whole, groups.tp_rank, groups.tp_size)
                flat = shard.contiguous().view(-1).to(student.device)
            else:
                flat = torch.empty(_shard_size(reader, name, groups.tp_size), device=student.device)
            if groups.dp_size > 1:
                dist.broadcast(flat, group_src=owner, group=groups.mpu.dp)
            piece = pieces.get(name)
            if piece is not None:
                piece.of(buffers[kind]).copy_(flat[piece.start : piece.start + piece.count])


def _shard_size(reader: CheckpointReader, name: str, tp_size: int) -> int:
    whole = torch.empty(reader.shapes[name], device="meta")
    return reader.placement(name).to_shard(whole, 0, tp_size).numel()
