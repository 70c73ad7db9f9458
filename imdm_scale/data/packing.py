"""Documents' token ids to blocks of equal length: pure arithmetic, fed in batches of any size.

    state = EMPTY
    for ids_N, lengths_R in batches:
        state, blocks_BL = pack(layout, state, ids_N, lengths_R)
    state = finish(state)

How the documents are cut into batches changes no block. A `PackState` is a place in the corpus: packing that goes on
from a stored one gives the blocks that would have followed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

Packing = Literal["wrapped", "plain", "document"]

BLANK = -1
"""Length of a row whose text is only white space: no document, but a row of its group."""


@dataclass(frozen=True)
class BlockLayout:
    """How documents become blocks."""

    packing: Packing
    """wrapped: the documents are concatenated and cut into chunks of length - 2; a block is BOS, a chunk, EOS (MDLM,
    arXiv 2406.07524). plain: they are concatenated and cut into blocks. document: a block is BOS, one document cut to
    length - 2, EOS, filled up with EOS."""
    length: int
    """Tokens in a block."""
    documents_per_group: int
    """wrapped, plain: rows that are concatenated; what is left of each group after its last whole chunk is
    dropped. 1000 in the literature, where it is the batch size of the datasets library; 0: one group, the split."""
    document_eos: bool
    """wrapped, plain: EOS after each document."""
    bos_id: int
    eos_id: int
    dtype: str
    """NumPy's name of the ids' type."""

    @property
    def chunk_length(self) -> int:
        """Tokens of text in a whole block."""
        return self.length if self.packing == "plain" else self.length - 2


@dataclass(frozen=True)
class PackState:
    """A place in a split: everything that the blocks to come depend on."""

    num_rows: int = 0
    """Rows of the source packed so far, blank ones among them."""
    num_documents: int = 0
    """Documents among them."""
    num_tokens: int = 0
    """Ids of these documents; with `document_eos`, the EOS after each is one of them."""
    num_dropped: int = 0
    """Of these, the ids that are in no block and will be in none."""
    num_blocks: int = 0
    """Blocks given out so far."""
    rest: tuple[int, ...] = ()
    """The ids of this group that do not fill a chunk yet."""


EMPTY = PackState()
"""The start of a split."""


def pack(
    layout: BlockLayout, state: PackState, ids_N: np.ndarray, lengths_R: np.ndarray
) -> tuple[PackState, np.ndarray]:
    """Packs the next R rows of a split.

    Args:
        state: what the rows before left.
        ids_N: the rows' token ids one after another, without BOS and EOS, of type `layout.dtype`.
        lengths_R: number of ids of each row, an integer type; `BLANK` for a row without a document.

    Returns:
        The state after these rows, and the blocks that they complete, `layout.dtype` (number of blocks, length).
    """
    is_document_R = lengths_R != BLANK
    lengths_R = np.where(is_document_R, lengths_R, 0).astype(np.int64)
    if layout.packing == "document":
        blocks_BL = _one_document_a_row(layout, ids_N, lengths_R[is_document_R])
        rest, num_dropped = state.rest, int(np.maximum(lengths_R - layout.chunk_length, 0).sum())
    else:
        if layout.document_eos:
            ids_N = _with_eos(ids_N, lengths_R[is_document_R], layout.eos_id)
            lengths_R += is_document_R
        chunks_BC, rest, num_dropped = _chunks(layout, state, ids_N, lengths_R)
        blocks_BL = chunks_BC if layout.packing == "plain" else _wrapped(layout, chunks_BC)
    return PackState(
        num_rows=state.num_rows + len(lengths_R),
        num_documents=state.num_documents + int(is_document_R.sum()),
        num_tokens=state.num_tokens + len(ids_N),
        num_dropped=state.num_dropped + num_dropped,
        num_blocks=state.num_blocks + len(blocks_BL),
        rest=rest,
    ), blocks_BL


def finish(state: PackState) -> PackState:
    """The state after a split's last row: the rest of its last group is dropped."""
    return dataclasses.replace(state, num_dropped=state.num_dropped + len(state.rest), rest=())


def _with_eos(ids_N: np.ndarray, lengths_D: np.ndarray, eos_id: int) -> np.ndarray:
    """The ids of D documents with EOS after each."""
    ids_M = np.full(len(ids_N) + len(lengths_D), eos_id, dtype=ids_N.dtype)
    is_text_M = np.ones(len(ids_M), dtype=bool)
    is_text_M[np.cumsum(lengths_D + 1) - 1] = False
    ids_M[is_text_M] = ids_N
    return ids_M


def _chunks(
    layout: BlockLayout, state: PackState, ids_N: np.ndarray, lengths_R: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...], int]:
    """The chunks that R rows complete (number of chunks, chunk length), the rest after them, and the ids dropped."""
    num_rows, group, size = len(lengths_R), layout.documents_per_group, layout.chunk_length
    group_ends = range(group - state.num_rows % group, num_rows + 1, group) if group else range(0)
    starts_R = np.concatenate([[0], np.cumsum(lengths_R)])
    rest, num_dropped = np.array(state.rest, dtype=ids_N.dtype), 0
    chunks = [np.empty((0, size), dtype=ids_N.dtype)]
    for first, last in pairwise(sorted({0, *group_ends, num_rows})):
        ids = np.concatenate([rest, ids_N[starts_R[first] : starts_R[last]]])
        whole = len(ids) // size * size
        chunks.append(ids[:whole].reshape(-1, size))
        rest = ids[whole:]
        if last in group_ends:
            num_dropped += len(rest)
            rest = rest[:0]
    return np.concatenate(chunks), tuple(rest.tolist()), num_dropped


def _wrapped(layout: BlockLayout, chunks_BC: np.ndarray) -> np.ndarray:
    """BOS, chunk, EOS."""
    blocks_BL = np.empty((len(chunks_BC), layout.length), dtype=chunks_BC.dtype)
    blocks_BL[:, 0] = layout.bos_id
    blocks_BL[:, 1:-1] = chunks_BC
    blocks_BL[:, -1] = layout.eos_id
    return blocks_BL


def _one_document_a_row(layout: BlockLayout, ids_N: np.ndarray, lengths_D: np.ndarray) -> np.ndarray:
    """BOS, the document's first length - 2 ids, EOS to the end."""
    blocks_DL = np.full((len(lengths_D), layout.length), layout.eos_id, dtype=ids_N.dtype)
    blocks_DL[:, 0] = layout.bos_id
    documents_N = np.repeat(np.arange(len(lengths_D)), lengths_D)
    positions_N = np.arange(len(ids_N)) - np.repeat(np.cumsum(lengths_D) - lengths_D, lengths_D)
    kept_N = positions_N < layout.chunk_length
    blocks_DL[documents_N[kept_N], positions_N[kept_N] + 1] = ids_N[kept_N]
    return blocks_DL
