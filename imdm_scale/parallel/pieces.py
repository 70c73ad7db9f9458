"""What of a network's training state lies on which rank: master weights, running means and average, all cut alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from imdm_scale.model.weights import placements
from imdm_scale.parallel import compat
from imdm_scale.parallel.engine import Student


@dataclass(frozen=True)
class Piece:
    """A run of elements of one tensor, and where this rank has it."""

    name: str
    """The tensor's canonical name."""
    tp: int
    """Number of the tensor-parallel shard; 0 where all ranks have the whole tensor."""
    start: int
    """The piece's first element in the flattened shard."""
    count: int
    """Elements; never 0."""
    buffer: int
    """Number of the master tensor in which it lies, and of its companions."""
    offset: int
    """Its first element there."""
    is_first_copy: bool
    """Whether this rank's copy is the one to be saved, of the equal ones that tensor- and data-parallel ranks have."""

    def of(self, buffers: list[Tensor]) -> Tensor:
        """The piece's elements in master tensors or their companions (a view, 1-D)."""
        return buffers[self.buffer].view(-1)[self.offset : self.offset + self.count]


def pieces_of(student: Student) -> Iterator[Piece]:
    """All pieces of this rank, in an order that is the same on all ranks of a data-parallel group."""
    groups = student.groups
    placement_of = {
        id(parameter): placement for stage in student.stages for parameter, placement in placements(stage)
    }
    is_partitioned = groups.layout.zero_stage > 0
    fragments = compat.master_fragments(student.engine, groups.dp_rank)
    for number, (parameter, start, count, buffer, offset) in enumerate(fragments):
        placement = placement_of[id(parameter)]
        is_cut = placement.shard_dim is not None
        is_first_copy = is_cut or groups.tp_rank == 0
        if not is_partitioned:
            # Every replica has everything: each saves its share.
            is_first_copy = is_first_copy and number % groups.dp_size == groups.dp_rank
        if count:
            yield Piece(
                placement.name, groups.tp_rank if is_cut else 0, start, count, buffer, offset, is_first_copy
            )
