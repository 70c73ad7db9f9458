"""What a checkpoint holds, whether it is whole, and how two of them differ; for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from imdm_scale.checkpoint.manifest import DamagedCheckpoint, Manifest
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.verify import candidates, damages, none_whole
from imdm_scale.errors import UserError


def inspect(path: Path) -> list[Table]:
    """Tables about the checkpoint at a path, or about each of a run's, newest first.

    Raises:
        UserError: there is none.
    """
    found = candidates(path)
    if not found:
        raise none_whole(path, [])
    return [_table(folder) for folder in found]


def _table(folder: Path) -> Table:
    table = Table(title=str(folder), title_justify="left", show_header=False)
    try:
        manifest = Manifest.read(folder)
    except DamagedCheckpoint as error:
        table.add_row("damaged", str(error))
        return table
    network, layout = manifest.network(), manifest.layout
    table.add_row("updates", f"{manifest.step:,}")
    if manifest.config:
        method, progress = manifest.config["method"]["name"], manifest.progress
        table.add_row("method", method)
        table.add_row(
            "progress",
            f"{progress['network_evaluations']:,} network evaluations, {progress['optimizer_updates']:,} updates of "
            f"the optimizer, {progress['ema_updates']:,} of the average, {progress['seconds']:.0f} s of training",
        )
    if manifest.data is not None:
        table.add_row("data", f"{manifest.data['samples']:,} samples of {manifest.data['data_hash'][:12]}")
    table.add_row("teacher", _teacher(manifest.teacher))
    table.add_row(
        "network",
        f"{network.num_parameters() / 1e6:,.2f} M parameters: {network.num_layers} layers of width "
        f"{network.hidden_size}, {network.num_heads} heads, {network.vocab_size:,} ids, noise of {network.noise_dim}",
    )
    table.add_row("tensors", ", ".join(manifest.kinds))
    table.add_row(
        "layout",
        f"{layout['ranks']} ranks: tp {layout['tp']} x pp {layout['pp']} x dp {layout['dp']}, "
        f"ZeRO-{layout['zero_stage']}",
    )
    table.add_row("files", f"{len(manifest.files)}, {manifest.num_bytes / 2**20:,.1f} MiB")
    for name, value in manifest.made_by.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        table.add_row(name, str(value))
    wrong = list(damages(folder, manifest.files.items(), hashes=False))
    table.add_row("files are there", "; ".join(wrong) or "yes, in their sizes (verify reads them)")
    return table


def _teacher(teacher: dict[str, Any] | None) -> str:
    if teacher is None:
        return "none"
    if "weights" in teacher:
        return f"a past student, in {teacher['weights']}/"
    return f"{teacher['path']}, SHA-256 {teacher['sha256'][:12]}"


def verify(path: Path, say: Callable[[str], None]) -> None:
    """Read all files of a checkpoint, or of each of a run's, and compare them with the manifest.

    Raises:
        UserError: there is none, or one is damaged; all have been looked at then.
    """
    found = candidates(path)
    if not found:
        raise none_whole(path, [])
    damaged = []
    for folder in found:
        try:
            manifest = Manifest.read(folder)
            wrong = list(damages(folder, manifest.files.items()))
            CheckpointReader(folder, manifest)
        except DamagedCheckpoint as error:
            wrong = [str(error)]
        if wrong:
            damaged.append(folder.name)
        say(
            f"{folder}: {'; '.join(wrong) or f'whole, {manifest.num_bytes:,} bytes in {len(manifest.files)} files'}"
        )
    if damaged:
        raise UserError(f"damaged: {', '.join(damaged)}; a run that resumes passes over them.")


def diff(first: Path, second: Path) -> Iterator[str]:
    """How two checkpoints differ, line by line, whatever their layouts: settings, counters, and every tensor.

    Raises:
        UserError: one is no checkpoint, is damaged, or is of another network.
    """
    manifests = Manifest.read(first), Manifest.read(second)
    for title in ("step", "layout", "progress", "data", "teacher", "config", "made_by"):
        yield from _fields(title, *(getattr(manifest, title) for manifest in manifests))
    networks = [manifest.network() for manifest in manifests]
    if networks[0] != networks[1]:
        yield from _fields("architecture", *(manifest.architecture for manifest in manifests))
        raise UserError(f"{first} and {second} are of different networks, whose tensors cannot be compared.")
    kinds = [kind for kind in manifests[0].kinds if kind in manifests[1].kinds]
    yield from _fields("kinds", *(list(manifest.kinds) for manifest in manifests))
    with CheckpointReader(first, manifests[0]) as one, CheckpointReader(second, manifests[1]) as other:
        for kind in kinds:
            number = 0
            largest, where = 0.0, ""
            for name in one.shapes:
                gap = (one.whole(kind, name) - other.whole(kind, name)).abs().max()
                if gap != 0:  # of NaN, too
                    number += 1
                    if not gap <= largest:
                        largest, where = float(gap), name
            if number:
                yield f"{kind}: {number} of {len(one.shapes)} tensors differ, by {largest:.3g} at most, in {where}"


def _fields(name: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _fields(f"{name}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield f"{name}: {one} | {other}"
