"""Damage of any kind is seen, said, and passed over in favour of an older whole checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.checkpoint.background import Retention, remove_unfinished, supersede
from imdm_scale.checkpoint.manifest import DamagedCheckpoint, Manifest
from imdm_scale.checkpoint.split import write_split
from imdm_scale.checkpoint.verify import candidates, damages, name_of, newest_whole
from imdm_scale.config.model_folder import CHECKPOINTS, LATEST, MANIFEST_FILE
from imdm_scale.errors import UserError
from imdm_scale.hf.export import config_from_architecture
from imdm_scale.model.weights import canonical_shapes
from tests.tiny import tiny

OLD, NEW = 5, 10
SHARD = "student-00001.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two whole checkpoints."""
    run_dir = tmp_path_factory.mktemp("run")
    for step in (OLD, NEW):
        write_split(
            run_dir / CHECKPOINTS / name_of(step),
            config_from_architecture(tiny()),
            lambda kind, name: torch.rand(canonical_shapes(tiny())[name]),
            tp=2,
            pp=1,
        )
    (run_dir / CHECKPOINTS / LATEST).write_text(name_of(NEW) + "\n")
    return run_dir


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def truncate(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as stream:
        stream.truncate(100)


def flip_a_bit(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def another_format(folder: Path) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace('"format": 1', '"format": 99'))


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("")


DAMAGE = {
    "truncated": (truncate, f"{SHARD} has 100 bytes, but the manifest says"),
    "a bit of a shard": (flip_a_bit(SHARD), f"{SHARD} has been changed"),
    "a bit of the configuration": (flip_a_bit("model/config.json"), "model/config.json has been changed"),
    "a bit of the manifest": (flip_a_bit(MANIFEST_FILE), MANIFEST_FILE),
    "a missing shard": (delete(SHARD), f"{SHARD} is missing"),
    "no manifest": (delete(MANIFEST_FILE), "cannot be read"),
    "an empty manifest": (empty_manifest, "is damaged"),
    "a later format": (another_format, "format 99"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    run_dir: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(run_dir / CHECKPOINTS / name_of(NEW))
    folder, _, passed_over = newest_whole(run_dir)
    assert folder == run_dir / CHECKPOINTS / name_of(OLD)
    assert len(passed_over) == 1 and words in passed_over[0] and name_of(NEW) in passed_over[0]
    damage(folder)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole"):
        newest_whole(run_dir)


def test_any_changed_byte_of_any_file_is_seen(original: Path) -> None:
    folder = original / CHECKPOINTS / name_of(NEW)
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    @settings(max_examples=200)
    @given(st.data())
    def changed(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files))
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        bit = data.draw(st.integers(0, 7))
        other = bytearray(content)
        other[place] ^= 1 << bit
        try:
            path.write_bytes(other)
            try:
                manifest = Manifest.read(folder)
            except DamagedCheckpoint:
                return
            found = list(damages(folder, manifest.files.items()))
            # White space between the manifest's fields is the only thing that may change unseen.
            assert found or json.loads(other) == json.loads(content)
        finally:
            path.write_bytes(content)

    changed()


@pytest.mark.parametrize("latest", [None, name_of(OLD), "step-99999999", "nonsense"])
def test_what_latest_says_does_not_matter(run_dir: Path, latest: str | None) -> None:
    (run_dir / CHECKPOINTS / LATEST).unlink()
    if latest is not None:
        (run_dir / CHECKPOINTS / LATEST).write_text(latest)
    assert newest_whole(run_dir)[1] is not None
    assert newest_whole(run_dir)[0].name == name_of(NEW)


def test_what_a_path_may_name(run_dir: Path, tmp_path: Path) -> None:
    new = run_dir / CHECKPOINTS / name_of(NEW)
    assert [path.name for path in candidates(run_dir)] == [name_of(NEW), name_of(OLD)]
    assert candidates(run_dir / CHECKPOINTS) == candidates(run_dir)
    assert candidates(new) == [new]
    assert candidates(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest_whole(tmp_path)
    set_aside = supersede(new)
    assert set_aside.is_dir() and newest_whole(run_dir)[0].name == name_of(OLD)


def test_unfinished_folders_are_removed_and_nothing_else(run_dir: Path) -> None:
    root = run_dir / CHECKPOINTS
    before = set(root.iterdir())
    (root / ".step-00000015.partial" / "model").mkdir(parents=True)
    assert newest_whole(run_dir)[0].name == name_of(NEW)
    remove_unfinished(root)
    assert set(root.iterdir()) == before


@given(st.sets(st.integers(1, 60)), st.integers(1, 4), st.integers(0, 10))
def test_what_is_kept(steps: set[int], keep_last: int, keep_every: int) -> None:
    going = set(Retention(keep_last, keep_every).dispensable(sorted(steps)))
    kept = steps - going
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert all(step in kept for step in steps if keep_every and step % keep_every == 0)
    assert len(kept) <= keep_last + (len([s for s in steps if s % keep_every == 0]) if keep_every else 0)


def test_a_file_that_cannot_be_read_is_named(run_dir: Path) -> None:
    folder = run_dir / CHECKPOINTS / name_of(NEW)
    (folder / SHARD).unlink()
    os.mkdir(folder / SHARD)
    found = list(damages(folder, Manifest.read(folder).files.items()))
    assert len(found) == 1 and SHARD in found[0]
