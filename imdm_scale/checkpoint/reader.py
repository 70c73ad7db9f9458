"""The tensors of a checkpoint, read piece by piece: any part of any tensor, whatever the layout that wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imdm_scale.checkpoint.manifest import DamagedCheckpoint, Manifest
from imdm_scale.model.placement import Placement
from imdm_scale.model.weights import canonical_shapes, placement_of


class CheckpointReader:
    """A context manager; files are opened when they are needed and closed at the end.

    Args:
        folder: of a checkpoint that verifies.
        manifest: its manifest.

    Raises:
        DamagedCheckpoint: the pieces do not make up the whole network.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.architecture = manifest.network()
        self.shapes = canonical_shapes(self.architecture)
        self._places: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for file, pieces in manifest.pieces.items():
            for name, tp, start, count in pieces:
                self._places.setdefault((name, tp), []).append((start, start + count, file))
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for name in self.shapes:
            for tp in range(self.num_shards(name)):
                self._check_covered(name, tp)

    def placement(self, name: str) -> Placement:
        """How a tensor is cut."""
        return placement_of(name, self.architecture)

    def num_shards(self, name: str) -> int:
        """Tensor-parallel shards of a tensor in this checkpoint."""
        return 1 if self.placement(name).shard_dim is None else self.manifest.tp

    def shard_shape(self, name: str) -> torch.Size:
        """Shape of each of them."""
        whole = torch.empty(self.shapes[name], device="meta")
        return self.placement(name).to_shard(whole, 0, self.manifest.tp).shape

    def part(self, kind: str, name: str, tp: int, start: int, count: int) -> Tensor:
        """Elements of a flattened shard, (count,) float32.

        Raises:
            DamagedCheckpoint: a file cannot be read.
        """
        result = torch.empty(count)
        for first, end, file in self._places[name, tp]:
            low, high = max(first, start), min(end, start + count)
            if low < high:
                result[low - start : high - start] = self._read(
                    file, f"{kind}/{name}", low - first, high - first
                )
        return result

    def shard(self, kind: str, name: str, tp: int) -> Tensor:
        """One tensor-parallel shard, float32."""
        shape = self.shard_shape(name)
        return self.part(kind, name, tp, 0, shape.numel()).view(shape)

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole tensor, float32, without the padding of the vocabulary."""
        placement, num_shards = self.placement(name), self.num_shards(name)
        if num_shards == 1:
            return placement.uncut(self.shard(kind, name, 0), 1)
        # Shard by shard into one tensor, so that they are never there twice.
        assert placement.shard_dim is not None
        shape = list(self.shard_shape(name))
        shape[placement.shard_dim] *= num_shards
        padded = torch.empty(shape)
        for tp, place in enumerate(padded.chunk(num_shards, dim=placement.shard_dim)):
            place.copy_(self.shard(kind, name, tp))
        return placement.uncut(padded, num_shards)

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """All whole tensors of a kind in file order, one at a time."""
        for name in self.shapes:
            yield name, self.whole(kind, name)

    def _read(self, file: str, key: str, first: int, end: int) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            return self._files[file].get_slice(key)[first:end]
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{self.folder / file} cannot be read ({error})") from None

    def _check_covered(self, name: str, tp: int) -> None:
        places = sorted(self._places.get((name, tp), []))
        end = 0
        for first, its_end, _ in places:
            if first != end:
                break
            end = its_end
        if end != self.shard_shape(name).numel():
            raise DamagedCheckpoint(
                f"{self.folder} lacks a part of {name} (shard {tp}): its elements are there up to {end} of "
                f"{self.shard_shape(name).numel()}"
            )

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        self._stack.close()
