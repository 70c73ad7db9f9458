"""Kills runs at random until they have been killed so many times, and compares each with the undisturbed one.

    python -m tests.soak.kill_runs --kills 60 --seed 1

A run is started again and again, on the same layout, until it ends; then another begins. After every death the
newest whole checkpoint must be no older than the one that `latest` named. At the end of a run losses and weights must
be the undisturbed run's, bit for bit. Prints what was killed where, and fails at the first difference.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.distributed.killing import finished_step, launch, random_kills, whole_step
from tests.distributed.layouts import micro_batches, student, teacher
from tests.distributed.pool import PRELOAD, RankPool
from tests.distributed.product import Run, losses_of, student_of, write_teacher

WORDS = ("train.max_steps=8", "train.save_every=1", "train.keep_every=4", "method.steps_per_round=3")
RUNS = [
    Run((*WORDS, *student(2), *micro_batches(2, 1)), 3, 2),
    Run((*WORDS, *student(), *micro_batches(2)), 1, 2),
    Run((*WORDS, *student(1, 2), *teacher(2), *micro_batches(2)), 2, 2),
    Run((*WORDS, *student(), *micro_batches(4)), 0, 1),
]
SECONDS = 8.0
"""A whole run takes about so long."""


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    pool, begun = RankPool(time_limit=600.0), time.monotonic()
    stages: collections.Counter[str] = collections.Counter()
    num_runs = passed_over = 0
    with tempfile.TemporaryDirectory() as scratch:
        while stages.total() < arguments.kills:
            run = RUNS[num_runs % len(RUNS)]
            whole, folder = Path(scratch) / f"whole-{num_runs % len(RUNS)}", Path(scratch) / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            for place in (whole, folder):
                if not place.exists():
                    place.mkdir()
                    write_teacher(place)
            if not (whole / "run" / "student").exists():
                assert launch(pool, run, whole, None).exit_codes == [0] * run.world_size
            for kill in random_kills(arguments.seed * 1000 + num_runs, run.world_size, SECONDS):
                before = finished_step(folder)
                ended = launch(pool, run, folder, kill)
                if not any(ended.exit_codes):
                    break  # it reached its end before the kill
                assert ended.exit_codes[kill.rank] == -signal.SIGKILL, ended.output
                where = (folder / "killed").read_text()
                stages["at a time" if kill.stage is None else where] += 1
                found = whole_step(folder)
                assert found >= finished_step(folder) >= before, (found, finished_step(folder), before)
                passed_over += "passed over" in ended.output
                print(
                    f"{stages.total():3}  run {num_runs}, rank {kill.rank} {where}: goes on after update {found}",
                    flush=True,
                )
            assert losses_of(folder) == losses_of(whole)
            expected, found_weights = student_of(whole), student_of(folder)
            assert all(np.array_equal(found_weights[name], expected[name]) for name in expected)
            num_runs += 1
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{stages.total()} kills in {num_runs} runs, {minutes:.1f} min: every run ended as the undisturbed one"
    )
    print(f"checkpoints passed over for damage: {passed_over}")
    for where, count in sorted(stages.items()):
        print(f"{count:4}  {where}")


if __name__ == "__main__":
    main()
