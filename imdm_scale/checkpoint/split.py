"""Weights from anywhere as a checkpoint that is cut for a layout, so that each of its ranks reads files of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imdm_scale.checkpoint.description import write_model
from imdm_scale.checkpoint.manifest import MASTER, FileRecord, Manifest, StoredPiece
from imdm_scale.checkpoint.shard_file import check_reads_back
from imdm_scale.checkpoint.verify import record_of
from imdm_scale.config.architecture import Architecture
from imdm_scale.data.durable import partial_path, sync
from imdm_scale.errors import UserError
from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.export import architecture_from_config
from imdm_scale.hf.safetensors_writer import SafetensorsWriter, TensorEntry
from imdm_scale.model.weights import canonical_shapes, placement_of, stage_of

WholeTensor = Callable[[str, str], Tensor]
"""(kind, canonical name) -> whole tensor."""


def check_split(architecture: Architecture, tp: int, pp: int) -> None:
    """Refuse a layout into which a network cannot be cut.

    Raises:
        UserError: naming the flag and what it may be.
    """
    for flag, parts, whole, what in (
        ("--tp", tp, architecture.num_heads, "attention heads"),
        ("--pp", pp, architecture.num_layers, "layers"),
    ):
        if parts < 1 or whole % parts:
            allowed = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise UserError(
                f"{flag} is {parts}, which does not divide the {whole} {what}; give one of {allowed}."
            )


def write_split(
    folder: Path,
    config: ImdmConfig,
    whole_tensor: WholeTensor,
    *,
    tp: int,
    pp: int,
    kinds: tuple[str, ...] = (MASTER,),
    dtype: torch.dtype = torch.float32,
    rank_V: Tensor | None = None,
    tokenizer_files: Iterable[Path] = (),
    made_by: dict[str, Any] | None = None,
) -> Manifest:
    """Write a checkpoint of a network; complete or absent. One whole tensor at a time is in memory.

    Args:
        folder: where to; it must not exist.
        config: the network, its tokenizer's fingerprint and ids.
        kinds: what there is of every tensor.
        dtype: in which it is stored.
        rank_V: ranks of the vocabulary, None in the order of ids.
        made_by: whatever tells how it was made.

    Raises:
        UserError: the folder exists, the network cannot be cut so, or the disk refuses.
    """
    architecture = architecture_from_config(config)
    check_split(architecture, tp, pp)
    if folder.exists():
        raise UserError(f"{folder} exists; give another folder or remove it.")
    partial = partial_path(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial, config, rank_V, tokenizer_files)
        files = {
            str(path.relative_to(partial)): record_of(path) for path in partial.rglob("*") if path.is_file()
        }
        pieces: dict[str, list[StoredPiece]] = {}
        for stage in range(pp):
            names = [
                name for name in canonical_shapes(architecture) if stage_of(name, architecture, pp) == stage
            ]
            for file, record, its_pieces in _write_stage(
                partial, architecture, whole_tensor, names, stage * tp, tp, kinds, dtype
            ):
                files[file], pieces[file] = record, its_pieces
        manifest = Manifest(
            step=0,
            kinds=kinds,
            architecture=dataclasses.asdict(architecture),
            layout={"ranks": tp * pp, "tp": tp, "pp": pp, "dp": 1, "zero_stage": 0},
            progress={},
            data=None,
            teacher=None,
            config={},
            deepspeed={},
            made_by=made_by or {},
            pieces=pieces,
            files=files,
        )
        manifest.write(partial)
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written ({error}); nothing else was changed: free space or correct the permissions."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_stage(
    folder: Path,
    architecture: Architecture,
    whole_tensor: WholeTensor,
    names: list[str],
    first_rank: int,
    tp: int,
    kinds: tuple[str, ...],
    dtype: torch.dtype,
) -> list[tuple[str, FileRecord, list[StoredPiece]]]:
    """The files of a pipeline stage's tensor-parallel ranks, written side by side."""
    shapes = canonical_shapes(architecture)
    placements = {name: placement_of(name, architecture) for name in names}
    own_names = [
        [name for name in names if rank == 0 or placements[name].shard_dim is not None] for rank in range(tp)
    ]
    files = [f"student-{first_rank + rank:05d}.safetensors" for rank in range(tp)]

    def shard_shape(name: str) -> tuple[int, ...]:
        return tuple(placements[name].to_shard(torch.empty(shapes[name], device="meta"), 0, tp).shape)

    sizes = {name: torch.Size(shard_shape(name)).numel() for name in names}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                SafetensorsWriter(
                    folder / files[rank],
                    [
                        TensorEntry(f"{kind}/{name}", dtype, (sizes[name],))
                        for kind in kinds
                        for name in own_names[rank]
                    ],
                )
            )
            for rank in range(tp)
        ]
        for kind in kinds:
            for name in names:
                whole = whole_tensor(kind, name)
                for rank in range(1 if placements[name].shard_dim is None else tp):
                    shard = placements[name].to_shard(whole, rank, tp)
                    writers[rank].write(f"{kind}/{name}", shard.reshape(-1))
    return [
        (
            files[rank],
            check_reads_back(folder / files[rank], writers[rank]),
            [
                StoredPiece(name, rank if placements[name].shard_dim is not None else 0, 0, sizes[name])
                for name in own_names[rank]
            ],
        )
        for rank in range(tp)
    ]
