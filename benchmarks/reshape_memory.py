"""The memory that one rank needs to read a checkpoint under another tensor-parallel size, beside its own state.

    python benchmarks/reshape_memory.py [--size large] [--folder FOLDER]

Writes a synthetic checkpoint of the size's network, all four kinds of tensors, for TP2 x PP2; then reads it as the
first rank of TP4 x DP8 does (`distill/student_state.py`): every whole tensor is put together, cut anew, and of the
cut the rank's partition is kept. Prints the largest anonymous memory above the kept partitions, and what follows for
7b, whose largest tensor is known.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from imdm_scale.checkpoint.manifest import Manifest
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.split import write_split
from imdm_scale.config.architecture import Architecture, size_named
from imdm_scale.hf.export import config_from_architecture
from imdm_scale.model.weights import canonical_shapes

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
TP, DP = 4, 8


def network(size: str) -> Architecture:
    """A named size over GPT-2's vocabulary."""
    return Architecture(vocab_size=50258, mask_token_id=50257, length=1024, **size_named(size))


def largest_tensor(architecture: Architecture) -> int:
    """Bytes in float32."""
    return max(4 * torch.Size(shape).numel() for shape in canonical_shapes(architecture).values())


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no RssAnon")


def write(folder: Path, architecture: Architecture) -> None:
    """The synthetic checkpoint."""

    def numbers(kind: str, name: str) -> Tensor:
        shape = canonical_shapes(architecture)[name]
        return torch.full(shape, float(KINDS.index(kind)))

    write_split(folder, config_from_architecture(architecture), numbers, tp=2, pp=2, kinds=KINDS)


def read(folder: Path, told: multiprocessing.Queue[tuple[int, int]]) -> None:
    """The first rank's part under the other layout."""
    torch.set_num_threads(1)
    kept: list[Tensor] = []
    above, over = [0], threading.Event()
    start = anonymous()

    def watch() -> None:
        while not over.wait(0.005):
            above[0] = max(above[0], anonymous() - start - sum(part.nbytes for part in list(kept)))

    thread = threading.Thread(target=watch)
    thread.start()
    with CheckpointReader(folder, Manifest.read(folder)) as reader:
        for name in reader.shapes:
            for kind in KINDS:
                flat = reader.placement(name).to_shard(reader.whole(kind, name), 0, TP).reshape(-1)
                size = -(-flat.numel() // DP)
                assert flat[0] == KINDS.index(kind)
                kept.append(flat[:size].clone())
                del flat
    over.set()
    thread.join()
    told.put((above[0], sum(part.nbytes for part in kept)))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="large")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written, and removed")
    arguments = parser.parse_args()
    architecture, seven = network(arguments.size), network("7b")
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        begun = time.monotonic()
        write(scratch / "model", architecture)
        written = time.monotonic() - begun
        size = sum(path.stat().st_size for path in (scratch / "model").rglob("*") if path.is_file())
        context = multiprocessing.get_context("spawn")
        told = context.Queue()
        begun = time.monotonic()
        process = context.Process(target=read, args=(scratch / "model", told))
        process.start()
        above, kept = told.get()
        process.join()
        seconds = time.monotonic() - begun
    finally:
        shutil.rmtree(scratch)
    gib, largest = 2**30, largest_tensor(architecture)
    print(
        f"{arguments.size}: {architecture.num_parameters() / 1e9:.2f} G parameters, checkpoint of {size / gib:.1f} GiB"
    )
    print(f"written in {written:.0f} s, read under the other layout in {seconds:.0f} s")
    print(f"a rank keeps {kept / gib:.2f} GiB, and beside it needed at most {above / gib:.2f} GiB")
    print(f"which is {above / largest:.1f} times the largest tensor, {largest / gib:.2f} GiB")
    its, state = largest_tensor(seven) / gib, 16 * seven.num_parameters() / gib
    print(
        f"7b: {seven.num_parameters() / 1e9:.2f} G parameters, {state:.0f} GiB of state; the largest tensor has "
        f"{its:.2f} GiB, so a rank needs about {above / largest * its:.1f} GiB beside its own "
        f"{state / TP / DP:.1f} GiB on {TP * DP} ranks"
    )


if __name__ == "__main__":
    main()
