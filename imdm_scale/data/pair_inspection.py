"""Is a shard of pairs what it should be?

Shapes: B pairs, W integers in a row.
"""

from __future__ import annotations

import numpy as np

from imdm_scale.data.manifest import Manifest
from imdm_scale.data.pairs import unpack_pairs


def pair_faults(rows_BW: np.ndarray, manifest: Manifest, first: int) -> list[tuple[int, str]]:
    """How many pairs of a shard have which fault.

    Args:
        rows_BW: some neighbouring rows, in the stored type.
        first: the number that the first of them should have.
    """
    record, t_min = manifest.tokenizer, manifest.options["t_min"]
    pairs = unpack_pairs(rows_BW)
    masked_BL = pairs.x_t_BL == record.mask_id
    foreign_B = (np.maximum(pairs.x_t_BL, pairs.x_0_BL) >= record.vocab_size).any(axis=1)
    unfilled_B = (pairs.x_0_BL == record.mask_id).any(axis=1)
    changed_B = ((pairs.x_t_BL != pairs.x_0_BL) & ~masked_BL).any(axis=1)
    untimely_B = ~((pairs.t_B >= np.float32(t_min)) & (pairs.t_B <= 1))
    misplaced_B = pairs.numbers_B != first + np.arange(len(rows_BW))
    return [
        (
            int(foreign_B.sum()),
            f"pairs with ids of {record.vocab_size} or more, which the tokenizer does not have",
        ),
        (int(unfilled_B.sum()), f"pairs whose text has masks (id {record.mask_id}) left"),
        (int(changed_B.sum()), "pairs whose text is another where nothing was masked"),
        (int(untimely_B.sum()), f"pairs with a time outside of [{t_min:g}, 1]"),
        (int(misplaced_B.sum()), "pairs with another number than their place asks for"),
    ]
