"""Training state under TP2 x DP2 ZeRO-3, saved and loaded under TP4: own pieces against torch.distributed.checkpoint.

    python benchmarks/checkpoint_formats.py [--hidden-size 1024] [--num-layers 8] [--repeats 3]

Four processes over gloo, one thread each. `pieces`: every rank writes its own partitions, hashes and reads them back;
loading puts whole tensors together and cuts them anew (`distill/student_state.py`). `dcp`: it knows tensors that
are cut along a dimension, not flat partitions of such, so the shards are first put together over the data-parallel
ranks; each rank then loads its shard under the other size. Prints medians. DCP neither hashes nor reads back;
`dcp+hash` adds the same reading of what was written.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from imdm_scale.checkpoint.manifest import Manifest, StoredPiece
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.shard_file import write_shard_file
from imdm_scale.checkpoint.verify import record_of
from imdm_scale.config.architecture import Architecture
from imdm_scale.model.weights import canonical_shapes, placement_of

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
TP, DP = 2, 2


def shard_of(architecture: Architecture, name: str, tp: int, tp_size: int) -> Tensor:
    """A shard whose numbers depend on name and place only."""
    shape = canonical_shapes(architecture)[name]
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return placement_of(name, architecture).to_shard(whole, tp, tp_size).contiguous()


def partition(flat: Tensor, dp: int) -> tuple[int, Tensor]:
    """ZeRO-3's part of a flattened shard: its first element, and the elements."""
    size = -(-flat.numel() // DP)
    return dp * size, flat[dp * size : (dp + 1) * size]


class Pieces:
    """The product's own way."""

    def __init__(self, architecture: Architecture, rank: int, folder: Path) -> None:
        self.architecture, self.rank, self.folder = architecture, rank, folder
        self.tp, self.dp = rank % TP, rank // TP
        self.names = list(canonical_shapes(architecture))
        self.own = {
            name: partition(shard_of(architecture, name, self.tp, TP).view(-1), self.dp)
            for name in self.names
        }

    def save(self) -> None:
        own = {
            name: part
            for name, part in self.own.items()
            if part[1].numel()
            and (placement_of(name, self.architecture).shard_dim is not None or self.tp == 0)
        }
        file = f"student-{self.rank:05d}.safetensors"
        record = write_shard_file(
            self.folder / file, {kind: {name: part for name, (_, part) in own.items()} for kind in KINDS}
        )
        cut = {name: placement_of(name, self.architecture).shard_dim is not None for name in own}
        pieces = [
            StoredPiece(name, self.tp if cut[name] else 0, first, part.numel())
            for name, (first, part) in own.items()
        ]
        told = [None] * (TP * DP)
        dist.all_gather_object(told, (file, record, pieces))
        self.manifest = Manifest(
            step=1, kinds=KINDS, architecture=vars(self.architecture), layout={"tp": TP}, progress={}, data=None,
            teacher=None, config={}, deepspeed={}, made_by={},
            pieces={file: pieces for file, _, pieces in told}, files={file: record for file, record, _ in told},
        )  # fmt: skip

    def prepare(self) -> None:
        self.found: dict[str, Tensor] = {}

    def load(self) -> None:
        with CheckpointReader(self.folder, self.manifest) as reader:
            for name in self.names:
                for kind in KINDS:
                    shard = reader.placement(name).to_shard(reader.whole(kind, name), self.rank, TP * DP)
                    self.found[f"{kind}/{name}"] = shard.clone()


class Dcp:
    """torch.distributed.checkpoint over tensors that are cut along a dimension."""

    def __init__(self, architecture: Architecture, rank: int, folder: Path, hashes: bool = False) -> None:
        self.pieces = Pieces(architecture, rank, folder)
        self.hashes = hashes
        self.saving = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
        self.loading = init_device_mesh("cpu", (TP * DP,), mesh_dim_names=("tp",))

    def state(self, mesh: object, tp_size: int, tp: int, fill: Callable[[str], Tensor]) -> dict[str, Tensor]:
        architecture = self.pieces.architecture
        found: dict[str, Tensor] = {}
        for name in self.pieces.names:
            dim = placement_of(name, architecture).shard_dim
            placements = [Replicate() if dim is None else Shard(dim)]
            if tp_size == TP:
                placements = [Replicate(), *placements]
            for kind in KINDS:
                found[f"{kind}/{name}"] = DTensor.from_local(fill(name), mesh, placements, run_check=False)
        return found

    def save(self) -> None:
        def gathered(name: str) -> Tensor:
            _, part = self.pieces.own[name]
            shape = shard_of(self.pieces.architecture, name, 0, TP).shape
            size = -(-shape.numel() // DP)
            padded = torch.zeros(size)
            padded[: part.numel()] = part
            parts = [torch.empty(size) for _ in range(DP)]
            dist.all_gather(parts, padded, group=self.saving["dp"].get_group())
            return torch.cat(parts)[: shape.numel()].view(shape)

        dcp.save(self.state(self.saving, TP, self.pieces.tp, gathered), checkpoint_id=self.pieces.folder)
        if self.hashes:
            for path in sorted(self.pieces.folder.iterdir())[self.pieces.rank :: TP * DP]:
                record_of(path)

    def prepare(self) -> None:
        rank, architecture = self.pieces.rank, self.pieces.architecture
        self.into = self.state(
            self.loading,
            TP * DP,
            rank,
            lambda name: torch.zeros_like(shard_of(architecture, name, rank, TP * DP)),
        )

    def load(self) -> None:
        dcp.load(self.into, checkpoint_id=self.pieces.folder)
        self.found = {key: tensor.to_local() for key, tensor in self.into.items()}


def check(architecture: Architecture, name: str, tp: int, shard: Tensor) -> None:
    """Whether a loaded shard has the right numbers at its ends."""
    expected = shard_of(architecture, name, tp, TP * DP).flatten()
    found = shard.flatten()
    assert found[0] == expected[0] and found[-1] == expected[-1], name


def measure(rank: int, arguments: argparse.Namespace, scratch: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{scratch}/store", TP * DP)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=TP * DP)
    architecture = Architecture(
        vocab_size=8192, mask_token_id=8191, length=128, hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers, num_heads=16, noise_dim=64,
    )  # fmt: skip
    folder = Path(scratch) / "checkpoint"
    ways = {
        "pieces": lambda: Pieces(architecture, rank, folder),
        "dcp": lambda: Dcp(architecture, rank, folder),
        "dcp+hash": lambda: Dcp(architecture, rank, folder, hashes=True),
    }
    if rank == 0:
        state = architecture.num_parameters() * 4 * len(KINDS)
        print(
            f"{architecture.num_parameters() / 1e6:.1f} M parameters, {state / 2**30:.2f} GiB of state, 4 ranks"
        )
        print("| way | save, s | load, s | on disk, GiB |\n|---|---|---|---|")
    for name, make in ways.items():
        figures: dict[str, list[float]] = {}
        for _ in range(arguments.repeats):
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            dist.barrier()
            way = make()
            for action in ("save", "load"):
                if action == "load":
                    way.prepare()
                dist.barrier()
                begun = time.monotonic()
                getattr(way, action)()
                dist.barrier()
                figures.setdefault(action, []).append(time.monotonic() - begun)
            for key, shard in way.found.items():
                check(architecture, key.partition("/")[2], rank, shard)
        if rank == 0:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
            save, load = (statistics.median(figures[action]) for action in ("save", "load"))
            print(f"| {name} | {save:.2f} | {load:.2f} | {size:.2f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(measure, (arguments, scratch), nprocs=TP * DP)


if __name__ == "__main__":
    main()
