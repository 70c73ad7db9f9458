"""How fast blocks are read, and how much memory that takes.

    python benchmarks/stream.py [--length 1024] [--mib 512] [--batch 64]

Rate: tokens a second of one process from the page cache into int64 batches, in page-locked memory where there is a GPU,
in the stream's shuffled order; beside it what a user of Hugging Face datasets would write: the same blocks in an Arrow
table, shuffled by `Dataset.shuffle`, read by torch's DataLoader in batches of the same size.

Memory: the same stream behind a web server on this machine, through a cache of a twentieth of its size; resident memory
of the reading process after each twentieth.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import multiprocessing
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from imdm_scale.data.folder import FetchSettings, PreparedFolder
from imdm_scale.data.manifest import FILE_NAME, FORMAT, Manifest, Shard, Split, TokenizerRecord
from imdm_scale.data.prepared_corpus import PreparedCorpus
from imdm_scale.data.read_ahead import read_ahead
from imdm_scale.data.stream import TokenStream

NUM_SHARDS = 80
WINDOW = 1
"""The cache holds two windows: with 80 shards a window of 2 would not fit into a twentieth of them."""


def write_folder(folder: Path, length: int, num_bytes: int, window: int) -> Manifest:
    """Random ids below GPT-2's 50,257 in shards of equal size."""
    (folder / "train").mkdir(parents=True)
    rows = num_bytes // (2 * length * NUM_SHARDS)
    shards = []
    for index in range(NUM_SHARDS):
        name = f"train/{index:05d}.npy"
        ids = np.random.default_rng(index).integers(0, 50257, (rows, length), dtype=np.uint16)
        np.save(folder / name, ids)
        content = (folder / name).read_bytes()
        shards.append(Shard(name, rows, len(content), hashlib.sha256(content).hexdigest()))
    tokenizer = TokenizerRecord("f" * 64, 50258, 50256, 50256, 50257)
    splits = {"train": Split(1, rows * NUM_SHARDS * length, 0, tuple(shards))}
    manifest = Manifest(FORMAT, length, "uint16", window, tokenizer, {}, {}, splits)
    (folder / FILE_NAME).write_text(manifest.to_json())
    return manifest


def rate_of_stream(folder: Path, batch: int, workers: int) -> float:
    """Tokens a second over one epoch, after an epoch that brings the files into the page cache."""
    opened = PreparedFolder.open(str(folder), FetchSettings(folder / "unused", 1 << 30, timeout=60.0))
    stream = TokenStream(PreparedCorpus(opened, "train"), seed=1)
    count = stream.num_blocks // batch
    requests = (np.arange(start * batch, (start + 1) * batch) for start in range(2 * count))
    reader = read_ahead(stream, requests, workers, pin_memory=torch.cuda.is_available())
    for _ in range(count):
        next(reader)
    begun = time.perf_counter()
    for _ in range(count):
        next(reader)
    return count * batch * stream.length / (time.perf_counter() - begun)


def rate_of_datasets(folder: Path, manifest: Manifest, batch: int) -> float:
    """The same for Arrow and DataLoader."""
    blocks = np.concatenate([np.load(folder / shard.file) for shard in manifest.splits["train"].shards])
    table = datasets.Dataset.from_dict({"ids": list(blocks)})
    table.save_to_disk(str(folder / "arrow"))
    table = datasets.load_from_disk(str(folder / "arrow")).shuffle(seed=1).with_format("torch")
    loader = DataLoader(table, batch_size=batch)  # type: ignore[arg-type]
    begun, seen = time.perf_counter(), 0
    for part in loader:
        seen += part["ids"].numel()
        if time.perf_counter() - begun > 20:
            break
    return seen / (time.perf_counter() - begun)


def serve(folder: Path, port: multiprocessing.connection.Connection) -> None:
    """A web server for `folder`, in a process of its own so that its memory is not counted."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    port.send(server.server_port)
    server.serve_forever()


def memory_of_stream(folder: Path, batch: int) -> tuple[list[float], float]:
    """Resident MiB after each twentieth of an epoch through the cache, and tokens a second."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, there), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}"
    total = sum(file.stat().st_size for file in (folder / "train").iterdir())
    with tempfile.TemporaryDirectory() as cache:
        opened = PreparedFolder.open(url, FetchSettings(Path(cache), total // 20, timeout=60.0))
        stream = TokenStream(PreparedCorpus(opened, "train"), seed=1)
        count = stream.num_blocks // batch
        begun, resident = time.perf_counter(), []
        for index in range(count):
            stream.batch(index * batch, batch)
            if (index + 1) % (count // 20) == 0:
                resident.append(psutil.Process().memory_info().rss / 2**20)
        seconds = time.perf_counter() - begun
    server.kill()
    return resident, count * batch * stream.length / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens in a block (default 1024)")
    parser.add_argument("--mib", type=int, default=512, help="size of the corpus (default 512)")
    parser.add_argument("--batch", type=int, default=64, help="blocks in a batch (default 64)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "corpus"
        manifest = write_folder(folder, arguments.length, arguments.mib << 20, WINDOW)
        resident, remote = memory_of_stream(folder, arguments.batch)
        rates = {
            "datasets.shuffle + DataLoader": rate_of_datasets(folder, manifest, arguments.batch),
            "stream, in the process itself": rate_of_stream(folder, arguments.batch, 0),
            "stream, one process reads ahead": rate_of_stream(folder, arguments.batch, 1),
            "stream, two processes read ahead": rate_of_stream(folder, arguments.batch, 2),
            "stream, through the web server and the cache": remote,
        }
    table = Table(title=f"{arguments.mib} MiB of blocks of {arguments.length}, {arguments.batch} at a time")
    for name, justify in (("reader", "left"), ("M tokens/s", "right"), ("ratio", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    base = next(iter(rates.values()))
    for name, rate in rates.items():
        table.add_row(name, f"{rate / 1e6:,.1f}", f"{rate / base:,.1f}")
    console.print(table)
    console.print(
        f"resident MiB after each twentieth, cache {arguments.mib / 20:.0f} MiB: "
        + " ".join(f"{mib:.0f}" for mib in resident),
        highlight=False,
    )


if __name__ == "__main__":
    main()
