"""A preparation into a folder in which something is already: other choices, changed text, somebody else at work."""

from __future__ import annotations

import dataclasses

import pytest

from imdm_scale.data.prepare import Progress
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from tests.data_pipeline.preparing import (
    SMALL,
    TEXTS,
    files_of,
    own_cache,
    prepared,
    report_always,
    source,
)

__all__ = ["own_cache", "report_always", "source"]


def interrupted(out, **how):
    """Lets a preparation end by an interrupt of its first report after `blocks` blocks of the training split."""

    def interrupt(progress):
        if progress.split == "train" and progress.blocks > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(out, report=interrupt, **how)


OTHERS = [
    ({"length": 17}, {}, "length 16, but length is now 17"),
    ({"packing": "plain"}, {}, "packing wrapped, but packing is now plain"),
    ({"documents_per_group": 1000}, {}, "documents_per_group 20, but documents_per_group is now 1000"),
    ({"document_eos": False}, {}, "document_eos True, but document_eos is now False"),
    ({"shard_bytes": 3000}, {}, "shard_bytes 1000, but shard_bytes is now 3000"),
    ({"shuffle_window": 2}, {}, "shuffle_window 8, but shuffle_window is now 2"),
    ({}, {"path": "other"}, r"source\.path text, but source\.path is now other"),
    ({}, {"detokenizer": "ptb"}, r"source\.detokenizer none, but source\.detokenizer is now ptb"),
]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(("options", "spec", "message"), OTHERS)
def test_other_choices_in_the_same_folder(tmp_path, source, report_always, state, options, spec, message):
    if state == "finished":
        prepared(tmp_path)
    else:
        interrupted(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=f"holds data prepared with {message}"):
        prepared(tmp_path, dataclasses.replace(SMALL, **options), SourceSpec(**{"path": "text", **spec}))
    after = files_of(tmp_path)
    after.pop(".lock", None)
    before.pop(".lock", None)
    assert after == before


def test_another_tokenizer_in_the_same_folder(tmp_path, source):
    prepared(tmp_path)
    other = load_tokenizer(None)
    other.fingerprint = "0" * 64
    with pytest.raises(
        UserError, match=r"tokenizer\.fingerprint \w{64}, but tokenizer\.fingerprint is now 0000"
    ):
        prepared(tmp_path, tokenizer=other)


def test_other_choices_take_the_place_of_a_try_that_finished_nothing(tmp_path, source):
    source(train=["a few words"], valid=TEXTS[:1])
    options = dataclasses.replace(SMALL, length=4000)
    with pytest.raises(UserError, match="The valid split of text does not fill one block of 4000 tokens"):
        prepared(tmp_path / "out", options)
    source()
    prepared(tmp_path / "out")
    prepared(tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_changed_text(tmp_path, source, report_always):
    interrupted(tmp_path)
    source(train=[*TEXTS, "and more"])
    with pytest.raises(UserError, match="text of the train split is not what it was when its preparation in"):
        prepared(tmp_path)
    source(valid=None)
    with pytest.raises(UserError, match="text of the valid split is not what it was"):
        prepared(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "short", "missing"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_finished_shard_is_checked_before_it_is_trusted(
    tmp_path, source, report_always, caplog, damage, number
):
    prepared(tmp_path / "undisturbed")
    interrupted(tmp_path / "out")
    file = tmp_path / "out" / "train" / f"0000{number}.npy"
    content = file.read_bytes()
    if damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "short":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    prepared(tmp_path / "out")
    assert f"train/0000{number}.npy" in caplog.text
    assert "made again" in caplog.text
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_finished_shards_are_not_made_again(tmp_path, source, report_always):
    interrupted(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(before) > 8
    first: list[Progress] = []
    prepared(tmp_path, report=first.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert first[0].split == "train", "the validation split was finished"
    assert first[0].tokens > first[0].tokens_before > 0


def test_foreign_files(tmp_path, source):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds files that no preparation left there \(thesis\.tex\)"):
        prepared(tmp_path)
    assert list(files_of(tmp_path)) == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex cannot be written \(File exists\)"):
        prepared(tmp_path / "thesis.tex")


def test_a_broken_progress_file(tmp_path, source, report_always):
    interrupted(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"progress\.json.* cannot be understood \(KeyError"):
        prepared(tmp_path)


def test_two_at_once(tmp_path, source, report_always):
    refused = []

    def prepare_too(progress):
        if not refused:
            with pytest.raises(UserError, match="is being prepared by another process") as refusal:
                prepared(tmp_path / "out")
            refused.append(refusal)

    prepared(tmp_path / "out", report=prepare_too)
    assert refused
    prepared(tmp_path / "alone")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_a_lock_left_by_a_dead_process_does_not_hold(tmp_path, source):
    (tmp_path / ".lock").touch()
    prepared(tmp_path)
    assert ".lock" not in files_of(tmp_path)
