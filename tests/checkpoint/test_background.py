"""Checkpoints are written while training goes on, one after the other; what cannot be written is said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from imdm_scale.checkpoint import background
from imdm_scale.checkpoint.background import CheckpointWriter, Retention, Snapshot
from imdm_scale.checkpoint.manifest import FileRecord, Manifest, StoredPiece
from imdm_scale.checkpoint.verify import name_of, newest_whole
from imdm_scale.errors import UserError

SNAPSHOT = Snapshot([StoredPiece("head.bias", 0, 0, 3)], {"master": {"head.bias": torch.arange(3.0)}})


def manifest(step: int) -> Manifest:
    return Manifest(
        step=step, kinds=("master",), architecture={}, layout={"tp": 1}, progress={}, data=None, teacher=None,
        config={}, deepspeed={}, made_by={}, pieces={}, files={},
    )  # fmt: skip


@pytest.fixture
def writer(world_of_one: None, tmp_path: Path) -> CheckpointWriter:
    group = dist.group.WORLD
    assert group is not None
    return CheckpointWriter(tmp_path / "checkpoints", (0,), group, Retention(keep_last=2, keep_every=0))


class SlowDisk:
    """Writing begins and goes on only when it is told to."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.write_shard_file = background.write_shard_file

    def __call__(self, path: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> FileRecord:
        self.begun.set()
        assert self.may_go_on.wait(60)
        return self.write_shard_file(path, tensors)


@pytest.fixture
def slow_disk() -> Iterator[SlowDisk]:
    disk = SlowDisk()
    with mock.patch.object(background, "write_shard_file", disk):
        yield disk
    disk.may_go_on.set()


def test_training_goes_on_while_bytes_reach_the_disk(writer: CheckpointWriter, slow_disk: SlowDisk) -> None:
    writer.save(1, SNAPSHOT, lambda: manifest(1))
    assert slow_disk.begun.wait(60), "in the background"
    assert not (writer.root / name_of(1)).exists() and not (writer.root / "latest").exists()
    writer.poll()
    slow_disk.may_go_on.set()
    writer.wait()
    assert newest_whole(writer.root)[1].step == 1
    assert (writer.root / "latest").read_text() == name_of(1) + "\n"


def test_there_are_never_two_under_way(writer: CheckpointWriter, slow_disk: SlowDisk) -> None:
    writer.save(1, SNAPSHOT, lambda: manifest(1))
    assert slow_disk.begun.wait(60)
    slow_disk.begun.clear()
    second = threading.Thread(target=writer.save, args=(2, SNAPSHOT, lambda: manifest(2)))
    second.start()
    assert not slow_disk.begun.wait(0.3) and second.is_alive(), "it waits for the first"
    assert len(list(writer.root.glob(".step-*"))) == 1
    slow_disk.may_go_on.set()
    second.join()
    assert (writer.root / name_of(1)).is_dir(), "the first was whole before the second began"
    writer.wait()
    assert newest_whole(writer.root)[1].step == 2


def test_a_failed_write_is_said_and_leaves_nothing_half_done(writer: CheckpointWriter) -> None:
    writer.save(1, SNAPSHOT, lambda: manifest(1))
    writer.wait()
    with mock.patch.object(
        background, "write_shard_file", side_effect=OSError(28, "No space left on device")
    ):
        writer.save(2, SNAPSHOT, lambda: manifest(2))
        assert writer.thread is not None
        writer.thread.join()
    with pytest.raises(UserError, match=r"after update 2 could not be written .*No space left on device"):
        writer.poll()
    assert sorted(path.name for path in writer.root.iterdir()) == ["latest", name_of(1)]
    writer.save(3, SNAPSHOT, lambda: manifest(3))
    writer.wait()
    assert newest_whole(writer.root)[1].step == 3


def test_a_disk_that_gives_back_something_else_is_noticed(writer: CheckpointWriter) -> None:
    wrong = FileRecord(1, "0" * 64)
    with mock.patch("imdm_scale.checkpoint.shard_file.record_of", return_value=wrong):
        writer.save(1, SNAPSHOT, lambda: manifest(1))
        with pytest.raises(UserError, match="does not read back as it was written"):
            writer.wait()
    assert not (writer.root / name_of(1)).exists()


def test_old_ones_go_and_one_in_the_way_is_kept_under_another_name(writer: CheckpointWriter) -> None:
    for step in (1, 2, 3, 3):
        writer.save(step, SNAPSHOT, lambda step=step: manifest(step))  # type: ignore[misc]
    writer.wait()
    expected = ["latest", name_of(2), name_of(3), f"superseded-{name_of(3)}"]
    assert sorted(path.name for path in writer.root.iterdir()) == sorted(expected)
