"""Which file format for token shards: rates of random and of sequential reading, from the page cache.

    python benchmarks/shard_formats.py [--mib 100] [--length 1024] [--batch 64] [--repeats 3]

The same blocks are written in each format, and read in batches of int64, as training needs them: rows drawn at random,
and all rows in order. Every batch is compared with what was written; then the fastest of several repetitions counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from rich.console import Console
from rich.table import Table

from imdm_scale.data.shards import ShardWriter, map_shard

VOCAB_SIZE = 50258


@dataclass(frozen=True)
class Reader:
    """Written blocks, and two ways to read them as int64 (B, L)."""

    rows: Callable[[np.ndarray], np.ndarray]
    """The rows of these numbers (B,)."""
    run: Callable[[int, int], np.ndarray]
    """The rows from one number to before another."""


def npy(folder: Path, blocks_BL: np.ndarray) -> Reader:
    """A shard of this project."""
    length, dtype = blocks_BL.shape[1], str(blocks_BL.dtype)
    writer = ShardWriter(folder / "train", length, dtype, shard_bytes=2 * blocks_BL.nbytes)
    writer.write(blocks_BL)
    (shard,) = writer.finish()
    with (folder / shard.file).open("rb") as stream:
        mapped_BL = map_shard(stream, shard.num_blocks, length, dtype)
    return Reader(
        rows=lambda rows_B: mapped_BL[rows_B].astype(np.int64),
        run=lambda first, last: mapped_BL[first:last].astype(np.int64),
    )


def saved_dataset(folder: Path, blocks_BL: np.ndarray) -> datasets.Dataset:
    """A dataset of the datasets library, written with save_to_disk and opened again."""
    ids = datasets.List(datasets.Value(str(blocks_BL.dtype)), length=blocks_BL.shape[1])
    written = datasets.Dataset.from_dict({"ids": blocks_BL}, features=datasets.Features({"ids": ids}))
    written.save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def arrow(folder: Path, blocks_BL: np.ndarray) -> Reader:
    """Arrow, read as NumPy by the datasets library."""
    saved = saved_dataset(folder, blocks_BL).with_format("numpy", dtype=np.int64)
    return Reader(
        rows=lambda rows_B: saved[rows_B]["ids"],
        run=lambda first, last: saved[first:last]["ids"],
    )


def arrow_table(folder: Path, blocks_BL: np.ndarray) -> Reader:
    """Arrow, read as a table whose values are taken as one flat array: the fastest way known to us."""
    saved = saved_dataset(folder, blocks_BL).with_format("arrow")

    def flat(table) -> np.ndarray:
        chunks = [chunk.flatten().to_numpy() for chunk in table["ids"].chunks]
        return np.concatenate(chunks).reshape(len(table), -1).astype(np.int64)

    return Reader(rows=lambda rows_B: flat(saved[rows_B]), run=lambda first, last: flat(saved[first:last]))


def megatron(folder: Path, blocks_BL: np.ndarray) -> Reader:
    """Megatron-core's indexed dataset, one sequence a block."""
    prefix = str(folder / "blocks")
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=blocks_BL.dtype.type)
    for block_L in blocks_BL:
        builder.add_document(torch.from_numpy(block_L), [len(block_L)])
    builder.finalize(get_idx_path(prefix))
    indexed = IndexedDataset(prefix)
    return Reader(
        rows=lambda rows_B: np.stack([indexed[int(row)] for row in rows_B]).astype(np.int64),
        run=lambda first, last: np.stack(indexed[first:last]).astype(np.int64),
    )


FORMATS = {
    ".npy, memory-mapped": npy,
    "Arrow, datasets with_format('numpy')": arrow,
    "Arrow, flat values of a table": arrow_table,
    "Megatron-core IndexedDataset": megatron,
}


def rate(read: Callable[[], int], repeats: int) -> float:
    """Tokens a second of the fastest of some calls of `read`, which returns the number of tokens that it read."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        num_tokens = read()
        rates.append(num_tokens / (time.perf_counter() - start))
    return max(rates)


def check(reader: Reader, blocks_BL: np.ndarray, batches: list[np.ndarray], batch: int) -> None:
    """Compares what is read with what was written."""
    for rows_B in batches:
        assert np.array_equal(reader.rows(rows_B), blocks_BL[rows_B])
    for first in range(0, len(blocks_BL), batch):
        assert np.array_equal(reader.run(first, first + batch), blocks_BL[first : first + batch])


def measure(reader: Reader, num_blocks: int, batches: list[np.ndarray], repeats: int) -> tuple[float, float]:
    """Tokens a second: random batches, batches in order."""
    batch = len(batches[0])
    return (
        rate(lambda: sum(reader.rows(rows_B).size for rows_B in batches), repeats),
        rate(lambda: sum(reader.run(i, i + batch).size for i in range(0, num_blocks, batch)), repeats),
    )


def main() -> None:
    """Writes, reads and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mib", type=int, default=100, help="size of the data as uint16, in MiB (default: 100)"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens in a block (default: 1024)")
    parser.add_argument("--batch", type=int, default=64, help="blocks read at a time (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="draws ids and rows (default: 0)")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    random = np.random.default_rng(arguments.seed)
    num_blocks = arguments.mib * 2**20 // (2 * arguments.length) // arguments.batch * arguments.batch
    blocks_BL = random.integers(0, VOCAB_SIZE, (num_blocks, arguments.length), dtype=np.uint16)
    batches = list(random.permutation(num_blocks).reshape(-1, arguments.batch))
    table = Table(
        title=f"{num_blocks:,} blocks of {arguments.length} tokens in batches of {arguments.batch}",
        caption="M tokens/s from the page cache to int64; in brackets: relative to the first row",
    )
    table.add_column("Format", no_wrap=True)
    for heading in ("random", "in order"):
        table.add_column(heading, justify="right")
    first: tuple[float, float] | None = None
    for name, write in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            reader = write(Path(folder), blocks_BL)
            check(reader, blocks_BL, batches, arguments.batch)
            rates = measure(reader, num_blocks, batches, arguments.repeats)
        first = first or rates
        cells = [f"{r / 1e6:,.0f} ({r / base:.2f})" for r, base in zip(rates, first, strict=True)]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
