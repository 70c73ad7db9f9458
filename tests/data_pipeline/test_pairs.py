"""Pairs as rows, and the folder in which several programs put them together.

B pairs, L positions.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import filelock
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.folder import PreparedFolder
from imdm_scale.data.manifest import FILE_NAME, FORMAT, Manifest, TokenizerRecord
from imdm_scale.data.pair_folder import FINISHED, PLAN_FILE, PairFolder
from imdm_scale.data.pair_inspection import pair_faults
from imdm_scale.data.pairs import Pairs, pack_pairs, row_width, unpack_pairs
from imdm_scale.data.synthetic_source import id_tokenizer
from imdm_scale.errors import UserError
from tests.data_pipeline.prepared import fetch_settings, open_folder

LENGTH = 5
TOKENIZER = id_tokenizer(11)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2**31 - 1), min_size=LENGTH, max_size=LENGTH),
            st.floats(0, 1, width=32, exclude_min=True),
            st.integers(0, 2**63 - 1),
        ),
        max_size=4,
    ),
    st.sampled_from(["uint32", "int64"]),
)
def test_rows_are_the_pairs(pairs: list, dtype: str) -> None:
    ids_BL = np.array([ids for ids, _, _ in pairs], dtype=np.int64).reshape(-1, LENGTH)
    t_B = np.array([t for _, t, _ in pairs], dtype=np.float32)
    numbers_B = np.array([number for _, _, number in pairs], dtype=np.int64)
    rows_BW = pack_pairs(Pairs(ids_BL, ids_BL[:, ::-1], t_B, numbers_B)).astype(dtype)
    assert rows_BW.shape[1] == row_width(LENGTH)
    found = unpack_pairs(rows_BW)
    for mine, its in zip(found, (ids_BL, ids_BL[:, ::-1], t_B, numbers_B), strict=True):
        assert mine.dtype == its.dtype and (mine == its).all()


def test_narrow_rows_hold_every_time_and_number() -> None:
    ids_BL = np.arange(2 * LENGTH).reshape(2, LENGTH)
    t_B = np.array([1.0, 1e-3], dtype=np.float32)
    numbers_B = np.array([2**63 - 1, 2**32])
    found = unpack_pairs(pack_pairs(Pairs(ids_BL, ids_BL, t_B, numbers_B)).astype(np.uint16))
    assert (found.t_B == t_B).all() and (found.numbers_B == numbers_B).all()


def plan(**options: object) -> Manifest:
    """Ten pairs in shards of four."""
    return Manifest(
        format=FORMAT,
        length=LENGTH,
        dtype="uint16",
        shuffle_window=8,
        tokenizer=TokenizerRecord.of(TOKENIZER),
        source={"data": None, "model": "/somewhere"},
        options={
            "packing": "pairs",
            "num_pairs": 10,
            "shard_pairs": 4,
            "framed": False,
            "seed": 3,
            **options,
        },
        splits={},
    )


def rows(folder: PairFolder, shard: int) -> np.ndarray:
    """The rows that a shard is to have."""
    numbers_B = np.array(folder.numbers(shard))
    ids_BL = numbers_B[:, None] % 11 + np.zeros((1, LENGTH), dtype=np.int64)
    return pack_pairs(Pairs(ids_BL, ids_BL, np.full(len(numbers_B), 0.5), numbers_B))


def make(out: Path, *shards: int, plan: Manifest = plan()) -> list[int]:  # noqa: B008 (never changed)
    """One program's work; which shards are missing after it."""
    folder = PairFolder(out, plan)
    if folder.begin(TOKENIZER):
        return []
    for shard in shards:
        with folder.claimed(shard) as mine:
            if mine and not folder.is_finished(shard):
                folder.write(shard, rows(folder, shard))
    return folder.finish()


def whole(out: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {
        str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()
    }


def test_any_order_and_any_number_of_programs_make_the_same_folder(tmp_path: Path) -> None:
    assert make(tmp_path / "one", 0, 1, 2) == []
    assert make(tmp_path / "several", 2) == [0, 1]
    assert make(tmp_path / "several", 1) == [0]
    assert not (tmp_path / "several" / FILE_NAME).exists()
    assert make(tmp_path / "several", 0, 1, 2) == []
    assert whole(tmp_path / "one") == whole(tmp_path / "several")
    stream = open_folder(tmp_path / "one")
    numbers = [
        unpack_pairs(stream.open_shard(shard)).numbers_B for shard in stream.manifest.splits["train"].shards
    ]
    assert np.concatenate(numbers).tolist() == list(range(10)), "no pair is missing, none is there twice"
    assert stream.manifest.row_width == 2 * LENGTH + 6


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    make(tmp_path, 0, 1, 2)
    before = whole(tmp_path)
    assert set(before) >= {FILE_NAME, "train/00000.npy", "train/00002.npy"}
    assert not [name for name in before if name.startswith((FINISHED, PLAN_FILE, "."))]
    assert make(tmp_path) == []
    assert whole(tmp_path) == before


def test_a_shard_without_its_note_is_made_again(tmp_path: Path) -> None:
    """As when the program dies between the two, or in the middle of the shard."""
    make(tmp_path, 0, 1)
    (tmp_path / FINISHED / "00001.json").unlink()
    (tmp_path / "train" / "00001.npy").write_bytes(b"half")
    (tmp_path / "train" / ".00002.npy.partial").write_bytes(b"half")
    assert make(tmp_path, 0, 1, 2) == []
    assert make(tmp_path.parent / "other", 0, 1, 2) == []
    found, expected = whole(tmp_path), whole(tmp_path.parent / "other")
    assert {name: found[name] for name in expected} == expected


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    make(tmp_path, 0, 1)
    file = tmp_path / "train" / "00000.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert make(tmp_path, 0, 1, 2) == []
    make(tmp_path.parent / "sound", 0, 1, 2)
    assert whole(tmp_path) == whole(tmp_path.parent / "sound")


def test_programs_that_end_together(tmp_path: Path) -> None:
    """All find the folder finished, or finish it, and none is in another's way."""
    context = multiprocessing.get_context("fork")
    for repeat in range(10):
        out = tmp_path / str(repeat)
        programs = [context.Process(target=make, args=(out, shard)) for shard in (0, 1, 2, 2)]
        for program in programs:
            program.start()
        for program in programs:
            program.join()
        assert [program.exitcode for program in programs] == [0] * 4
        assert open_folder(out).manifest.splits["train"].num_blocks == 10
        left = {name for name in whole(out) if name.startswith((FINISHED, PLAN_FILE, "."))}
        assert left <= {".lock"}, "which who comes late makes once more"


def test_another_program_that_is_first_with_the_manifest(tmp_path: Path) -> None:
    folder = PairFolder(tmp_path, plan())
    folder.begin(TOKENIZER)
    make(tmp_path, 0, 1, 2)
    assert folder.finish() == [] and folder.is_finished(1)


@pytest.mark.parametrize("finished", [False, True])
def test_other_choices_are_refused(tmp_path: Path, finished: bool) -> None:
    make(tmp_path, *([0, 1, 2] if finished else [0]))
    before = whole(tmp_path)
    with pytest.raises(UserError, match=r"prepared with seed 3, but seed is now 4"):
        make(tmp_path, 1, plan=plan(seed=4))
    assert whole(tmp_path) == before


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds files that no generation of pairs left there \(thesis.tex\)"):
        make(tmp_path, 0)
    assert set(whole(tmp_path)) <= {"thesis.tex", ".lock"}


def test_a_shard_is_one_programs_at_a_time(tmp_path: Path) -> None:
    folder = PairFolder(tmp_path, plan())
    folder.begin(TOKENIZER)
    other = filelock.FileLock(tmp_path / FINISHED / "00001.lock", is_singleton=False)
    with other, folder.claimed(1) as mine, folder.claimed(0) as free:
        assert not mine and free
    with folder.claimed(1) as mine:
        assert mine


def test_damage_is_noticed(tmp_path: Path) -> None:
    make(tmp_path, 0, 1, 2)
    file = tmp_path / "train" / "00001.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    folder = PreparedFolder.open(str(tmp_path), fetch_settings(tmp_path / "cache"))
    with pytest.raises(Exception, match=r"00001.npy is damaged"):
        folder.open_shard(folder.manifest.splits["train"].shards[1])


def test_text_manifests_are_as_before(tmp_path: Path) -> None:
    text = plan(packing="plain")
    assert not text.holds_pairs and text.row_width == LENGTH and not text.is_framed
    assert plan(packing="wrapped").is_framed and plan(framed=True).is_framed
    assert "kind" not in json.loads(text.to_json())


def test_faults_of_pairs_are_found() -> None:
    """One pair with each fault, by hand; a sound one has none."""
    manifest = plan(t_min=0.25)
    record = manifest.tokenizer
    mask = record.mask_id
    x_t_BL = np.array([[mask, 1, 2, 3, 4]] * 6)
    x_0_BL = np.array([[5, 1, 2, 3, 4]] * 6)
    t_B, numbers_B = np.full(6, 0.5), np.arange(20, 26)
    assert [
        count for count, _ in pair_faults(pack_pairs(Pairs(x_t_BL, x_0_BL, t_B, numbers_B)), manifest, 20)
    ] == [0] * 5
    x_0_BL[1, 0] = record.vocab_size
    x_0_BL[2, 0] = mask
    x_0_BL[3, 4] = 7
    t_B[4] = 0.2
    numbers_B[5] = 21
    faults = pair_faults(pack_pairs(Pairs(x_t_BL, x_0_BL, t_B, numbers_B)), manifest, 20)
    assert [count for count, _ in faults] == [1] * 5
