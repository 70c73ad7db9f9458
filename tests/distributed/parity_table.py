"""Prints the table of docs/parallelism.md: `OMP_NUM_THREADS=1 python -m tests.distributed.parity_table`.

Every case of `layouts.CASES` over twenty updates, or as few as its rounds last.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from tests.distributed.cases import train_small
from tests.distributed.layouts import CASES, SHORT
from tests.distributed.parity import deviation
from tests.distributed.pool import RankPool
from tests.distributed.small_run import plain_run, small_config, zero


def main() -> None:
    """One line a case, as soon as it is done."""
    torch.set_num_threads(1)
    pool = RankPool(600.0)
    reference = cache(lambda *what: plain_run(small_config(*what)))
    print("| layout | loss | gradient norm, relative | weights | EMA | bytes between ranks in an update |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        if set(SHORT) <= set(case.what):
            case = replace(case, what=tuple(word for word in case.what if word not in SHORT))
        results = pool.run(train_small, case.world_size, config=case.config, ds_json=zero(case.stage))
        outcome = results[case.layout.student.ranks[0]]
        found = deviation(outcome, reference(*case.what))
        figures = (found.loss, found.grad_norm, found.weight, found.average)
        traffic = sum(outcome.transport_bytes) // len(outcome.transport_bytes)
        print(f"| {case} | {' | '.join(f'{figure:.1e}' for figure in figures)} | {traffic} |", flush=True)


if __name__ == "__main__":
    main()
