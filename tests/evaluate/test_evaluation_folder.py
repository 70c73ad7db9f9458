"""The folder of an evaluation: what is kept, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imdm_scale.errors import UserError
from imdm_scale.evaluate import folder as folder_module
from imdm_scale.evaluate.folder import SCORES_FILE, Cell, EvaluationFolder, write_array

CELL = Cell(4, 0.9)
IDS = np.arange(60, dtype=np.uint16).reshape(10, 6)


def test_names_tell_cells_apart() -> None:
    assert CELL.name == "steps-0004_temperature-0.9"
    assert len({Cell(4, t).name for t in (0.9, 0.95, 0.925, 1.0)}) == 4


def test_samples_are_the_same_in_one_piece_or_several(tmp_path: Path) -> None:
    with EvaluationFolder.open(tmp_path / "whole", {}) as whole:
        whole.begin(CELL)
        whole.add_samples(CELL, IDS, 1.0)
    for first, last in ((0, 3), (3, 4), (4, 10)):
        with EvaluationFolder.open(tmp_path / "parts", {"command": f"{first}"}) as parts:
            assert parts.num_samples(CELL) == first
            parts.begin(CELL)
            parts.add_samples(CELL, IDS[first:last], 1.0)
    files = [tmp_path / name / "samples" / f"{CELL.name}.npy" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    read = EvaluationFolder.read(tmp_path / "parts")
    assert (read.samples(CELL) == IDS).all()
    assert read.cells[CELL.name]["invocations"] == [0, 1, 2]
    assert read.invocation(2) == {"command": "4"}
    assert read.cells[CELL.name]["seconds"] == 3.0


def test_an_interrupted_write_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.npy"
    write_array(file, IDS[:2])
    before = file.read_bytes()

    def interrupted(stream, array):
        stream.write(b"\x93NUMPY")
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module.np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_array(file, IDS)
    assert file.read_bytes() == before


def test_other_settings_are_refused(tmp_path: Path) -> None:
    with EvaluationFolder.open(tmp_path, {}) as folder:
        folder.claim("sampling", {"seed": 42, "sampler": "ancestral"})
        folder.claim("sampling", {"seed": 42, "sampler": "ancestral"})
    with (
        EvaluationFolder.open(tmp_path, {}) as folder,
        pytest.raises(UserError, match="whose seed is 42, but seed is now 43; give another --out"),
    ):
        folder.claim("sampling", {"seed": 43, "sampler": "ancestral"})
    with EvaluationFolder.open(tmp_path, {}) as folder, pytest.raises(UserError, match="prefixes is none"):
        folder.claim("sampling", {"seed": 42, "sampler": "ancestral", "prefixes": 7})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        EvaluationFolder.open(tmp_path, {}),
        pytest.raises(UserError, match="in use by another evaluation"),
        EvaluationFolder.open(tmp_path, {}),
    ):
        pass


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with (
        pytest.raises(UserError, match=r"thesis\.tex"),
        EvaluationFolder.open(tmp_path, {}),
    ):
        pass
    with pytest.raises(UserError, match="holds no evaluation"):
        EvaluationFolder.read(tmp_path)
    with (
        pytest.raises(UserError, match="cannot be written"),
        EvaluationFolder.open(tmp_path / "thesis.tex", {}),
    ):
        pass


def test_figures_stand_beside_each_other(tmp_path: Path) -> None:
    with EvaluationFolder.open(tmp_path, {}) as folder:
        folder.keep_figures(SCORES_FILE, "one", {"value": 1})
        folder.keep_figures(SCORES_FILE, "two", {"value": 2})
        assert folder.figures(SCORES_FILE) == {"one": {"value": 1}, "two": {"value": 2}}
    (tmp_path / SCORES_FILE).write_text("{")
    with pytest.raises(UserError, match=r"scores\.json cannot be read"):
        EvaluationFolder.read(tmp_path).figures(SCORES_FILE)
