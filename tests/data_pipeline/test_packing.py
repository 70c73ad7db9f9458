"""Packing against straightforward references, however the documents are cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.packing import BLANK, EMPTY, BlockLayout, PackState, finish, pack

BOS, EOS = 1, 2


def reference_blocks(layout, rows):
    """Blocks of rows, which are lists of ids or None for a blank text; one list a block."""
    eos, size = [EOS] if layout.document_eos else [], layout.length - 2
    documents = [row for row in rows if row is not None]
    if layout.packing == "document":
        filled = [[BOS, *row[:size], *([EOS] * layout.length)] for row in documents]
        return [block[: layout.length] for block in filled]
    blocks, group = [], layout.documents_per_group or max(len(rows), 1)
    for first in range(0, len(rows), group):
        texts = [[*row, *eos] for row in rows[first : first + group] if row is not None]
        text = [token for row in texts for token in row]
        if layout.packing == "plain":
            chunks = [text[i : i + layout.length] for i in range(0, len(text), layout.length)]
            blocks += [chunk for chunk in chunks if len(chunk) == layout.length]
        else:
            chunks = [text[i : i + size] for i in range(0, len(text), size)]
            blocks += [[BOS, *chunk, EOS] for chunk in chunks if len(chunk) == size]
    return blocks


def as_arrays(rows, dtype="uint16"):
    ids = [token for row in rows if row is not None for token in row]
    return np.array(ids, dtype), np.array([BLANK if row is None else len(row) for row in rows], np.int64)


def packed(layout, batches, state=EMPTY):
    """All blocks of batches of rows, and the states after each."""
    blocks, states = [], [state]
    for rows in batches:
        state, blocks_BL = pack(layout, state, *as_arrays(rows, layout.dtype))
        assert blocks_BL.dtype == layout.dtype
        assert blocks_BL.shape[1:] == (layout.length,)
        blocks += blocks_BL.tolist()
        states.append(state)
    return blocks, states


layouts = st.builds(
    BlockLayout,
    packing=st.sampled_from(["wrapped", "plain", "document"]),
    length=st.integers(3, 12),
    documents_per_group=st.integers(0, 7),
    document_eos=st.booleans(),
    bos_id=st.just(BOS),
    eos_id=st.just(EOS),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
batches_of_rows = st.lists(
    st.lists(st.none() | st.lists(st.integers(0, 65535), max_size=25), max_size=6), max_size=6
)


@given(layouts, batches_of_rows)
def test_blocks_against_the_reference(layout, batches):
    blocks, states = packed(layout, batches)
    rows = [row for batch in batches for row in batch]
    assert blocks == reference_blocks(layout, rows)
    assert states[-1].num_blocks == len(blocks)


@given(layouts, batches_of_rows)
def test_counts(layout, batches):
    rows = [row for batch in batches for row in batch]
    documents = [row for row in rows if row is not None]
    blocks, states = packed(layout, batches)
    end = finish(states[-1])
    assert (end.num_rows, end.num_documents, end.rest) == (len(rows), len(documents), ())
    if layout.packing == "document":
        assert end.num_tokens == sum(map(len, documents))
        assert end.num_tokens - end.num_dropped == sum(min(len(row), layout.length - 2) for row in documents)
    else:
        assert end.num_tokens == sum(map(len, documents)) + layout.document_eos * len(documents)
        assert end.num_tokens - end.num_dropped == len(blocks) * layout.chunk_length


@given(layouts, batches_of_rows, st.data())
def test_packing_goes_on_from_any_state(layout, batches, data):
    blocks, states = packed(layout, batches)
    at = data.draw(st.integers(0, len(batches)))
    stored = PackState(**vars(states[at]))
    later, states_again = packed(layout, batches[at:], stored)
    assert blocks[stored.num_blocks :] == later
    assert states_again[-1] == states[-1]


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("wrapped", [[1, 5, 6, 2], [1, 7, 2, 2], [1, 8, 2, 2], [1, 9, 2, 2], [1, 3, 2, 2]]),
        ("plain", [[5, 6, 7, 2], [8, 2, 9, 2]]),
        ("document", [[1, 5, 6, 2], [1, 2, 2, 2], [1, 8, 2, 2], [1, 9, 2, 2], [1, 3, 2, 2]]),
    ],
)
def test_layouts_by_hand(packing, expected):
    layout = BlockLayout(packing, 4, 3, True, BOS, EOS, "uint16")
    rows = [[5, 6, 7], [], None, [8], [9], None, [3]]
    assert packed(layout, [rows])[0] == expected
