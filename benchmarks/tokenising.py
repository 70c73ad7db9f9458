"""How fast text is prepared, beside the tokenizer's own rate.

    python benchmarks/tokenising.py [--source PATH_OR_HUB_NAME] [--tokenizer PATH_OR_NAME] [--workers 1 2] ...

The tokenizer alone tokenises the training text from memory, in one thread; then `prepare` makes shards of the same
text, reading, packing, hashing and writing included. They take turns in one run, so that other work on the machine
slows all, and the median of the repetitions counts. A rate per core is tokens by the seconds of CPU time of all
processes; the start of worker processes, which costs each about a second once, is part of it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.sources import SourceSpec, open_documents
from imdm_scale.data.tokenizer import load_tokenizer

BATCH = 128
"""Documents that the tokenizer alone is given at a time."""


@dataclass(frozen=True)
class Cost:
    """What some work took."""

    seconds: float
    """By the clock."""
    cpu_seconds: float
    """Of all cores, in this process and in those that it started."""


def cost(work: Callable[[], object]) -> Cost:
    """Does some work that waits for the processes that it starts."""

    def cpu() -> float:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, cpu_start = time.perf_counter(), cpu()
    work()
    return Cost(time.perf_counter() - start, cpu() - cpu_start)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", help="as in tools/prepare_data.py (default: the embedded books)")
    parser.add_argument("--train", help="part of it, such as 'train[:10000]' (default: the corpus' own rule)")
    parser.add_argument("--tokenizer", help="as in tools/prepare_data.py (default: the embedded one)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a block (default: 1024)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many counts (default: 5)")
    arguments = parser.parse_args()
    spec = SourceSpec(arguments.source, train=arguments.train, valid="none")
    tokenizer = load_tokenizer(arguments.tokenizer, setting="--tokenizer", allow_hub=True)
    documents = open_documents(spec, "train")
    assert documents is not None
    texts = [[text for text in batch if text.strip()] for batch in documents.batches(0, BATCH)]
    num_characters = sum(len(text) for batch in texts for text in batch)
    num_tokens = sum(len(ids) for batch in texts for ids in tokenizer.encode_batch(batch))

    def alone() -> None:
        for batch in texts:
            tokenizer.encode_batch(batch)

    def prepared(workers: int) -> None:
        """As the tool does it."""
        with tempfile.TemporaryDirectory() as folder:
            prepare(spec, tokenizer, PrepareOptions(arguments.length), Path(folder) / "out", workers)

    names = ["the tokenizer alone", *(f"prepare, workers {workers}" for workers in arguments.workers)]
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        costs[names[0]].append(cost(alone))
        for name, workers in zip(names[1:], arguments.workers, strict=True):
            costs[name].append(cost(partial(prepared, workers)))

    table = Table(
        title=f"{num_tokens:,} tokens of {num_characters:,} characters; median of {arguments.repeats}",
        title_justify="left",
    )
    for heading in ("", "seconds", "CPU seconds", "tokens/s", "tokens/s per core", "of the tokenizer's"):
        table.add_column(heading, justify="right" if heading else "left")
    base = statistics.median(found.cpu_seconds for found in costs[names[0]])
    for name in names:
        seconds = statistics.median(found.seconds for found in costs[name])
        cpu_seconds = statistics.median(found.cpu_seconds for found in costs[name])
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{cpu_seconds:.2f}",
            f"{num_tokens / seconds:,.0f}",
            f"{num_tokens / cpu_seconds:,.0f}",
            f"{100 * base / cpu_seconds:.0f}%",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
