"""The folder of an evaluation: what was asked for, the samples, and what was made of them.

    FOLDER/evaluation.json      settings, and of each cell which invocations drew it; see `EvaluationFolder`
    FOLDER/samples/CELL.npy     token ids (S, L) of one number of steps at one temperature, the first S samples
    FOLDER/scores/JUDGE/CELL.npy  float64 (S, 2): nll in nats and targets of each sample
    FOLDER/scores.json          the figures, by judge
    FOLDER/likelihood.json      the bounds, by data
    FOLDER/tokenizer/           what the ids mean

Every file is whole or absent. A sample is a function of its number and the settings, so a cell that was interrupted,
or of which more samples are wanted, goes on where its file ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from imdm_scale.data.durable import partial_path, put_in_place, write_whole
from imdm_scale.errors import UserError

FILE_NAME = "evaluation.json"
SCORES_FILE = "scores.json"
LIKELIHOOD_FILE = "likelihood.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True, order=True)
class Cell:
    """One way to sample."""

    num_steps: int
    temperature: float

    @property
    def name(self) -> str:
        """As files are called."""
        return f"steps-{self.num_steps:04d}_temperature-{self.temperature:g}"


class EvaluationFolder:
    """A folder that is open, as its `evaluation.json` says.

    `settings` has a section for each kind of work (`model`, `sampling`) with everything that decides about its
    results; `invocations` the records of `provenance`; `cells` of each cell the numbers of the invocations that drew
    samples and the seconds that they took.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        """Use `open` to write, `read` to look."""
        self.path, self._record = path, record

    @classmethod
    @contextmanager
    def open(cls, path: Path, invocation: dict[str, Any]) -> Iterator[EvaluationFolder]:
        """The folder, made if need be, for this process alone.

        Raises:
            UserError: another process holds it, it cannot be written, or holds other things.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            foreign = [entry.name for entry in path.iterdir() if entry.name != LOCK_FILE]
            if foreign and not (path / FILE_NAME).is_file():
                raise UserError(
                    f"--out {path} holds files that no evaluation left there (such as {min(foreign)}); "
                    "give an empty or a new folder."
                )
            lock = filelock.FileLock(path / LOCK_FILE, timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"--out {path} is in use by another evaluation; wait for its end, or give another folder."
            ) from None
        except OSError as error:
            raise UserError(
                f"--out {path} cannot be written ({error.strerror or error}); give another folder."
            ) from None
        try:
            if (path / FILE_NAME).is_file():
                folder = cls.read(path)
            else:
                folder = cls(path, {"settings": {}, "invocations": [], "cells": {}})
            folder._record["invocations"].append(invocation)
            yield folder
        finally:
            lock.release()

    @classmethod
    def read(cls, path: Path) -> EvaluationFolder:
        """The folder as it is.

        Raises:
            UserError: it has no `evaluation.json`, or a damaged one.
        """
        record = read_json(path / FILE_NAME)
        if record is None:
            raise UserError(f"{path} holds no {FILE_NAME}; name the --out folder of an evaluation.")
        return cls(path, record)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """By section."""
        return self._record["settings"]

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return self._record["cells"]

    @property
    def this_invocation(self) -> int:
        """Number of the invocation that has the folder open."""
        return len(self._record["invocations"]) - 1

    def invocation(self, number: int) -> dict[str, Any]:
        """The record of one."""
        return self._record["invocations"][number]

    def claim(self, section: str, settings: dict[str, Any]) -> None:
        """Says what this work is done with; the first to say so decides for the folder.

        Raises:
            UserError: the folder's is done with something else.
        """
        there = self.settings.setdefault(section, settings)
        for name in {**there, **settings}:
            if there.get(name) != settings.get(name):
                raise UserError(
                    f"--out {self.path} holds an evaluation whose {name} is {_shown(there.get(name))}, but {name} is "
                    f"now {_shown(settings.get(name))}; give another --out, or ask for the same again."
                )
        self._write()

    def note(self, name: str, value: str) -> None:
        """Says something that decides about nothing, such as where the model lies now."""
        self._record[name] = value
        self._write()

    def noted(self, name: str) -> str | None:
        """What `note` said last."""
        return self._record.get(name)

    def num_samples(self, cell: Cell) -> int:
        """Samples that are there."""
        path = self._samples_path(cell)
        return len(np.load(path, mmap_mode="r")) if path.is_file() else 0

    def samples(self, cell: Cell) -> np.ndarray:
        """The samples of a cell that has some, (S, L)."""
        return np.load(self._samples_path(cell))

    def begin(self, cell: Cell) -> None:
        """Notes that this invocation is about to draw samples of the cell."""
        noted = self.cells.setdefault(cell.name, {"invocations": [], "seconds": 0.0})
        noted["num_steps"], noted["temperature"] = cell.num_steps, cell.temperature
        noted["invocations"].append(self.this_invocation)
        self._write()

    def add_samples(self, cell: Cell, ids_SL: np.ndarray, seconds: float) -> None:
        """Appends the next samples, which took so many seconds."""
        if self.num_samples(cell):
            ids_SL = np.concatenate([self.samples(cell), ids_SL.astype(self.samples(cell).dtype)])
        write_array(self._samples_path(cell), ids_SL)
        self.cells[cell.name]["seconds"] += seconds
        self._write()

    def token_scores(self, judge: str, cell: str) -> np.ndarray | None:
        """What a judge said of samples of a cell, float64 (S, 2); None if it has not been asked."""
        return self.array(f"scores/{judge}/{cell}.npy")

    def keep_token_scores(self, judge: str, cell: str, scores_S2: np.ndarray) -> None:
        """Keeps them."""
        self.keep_array(f"scores/{judge}/{cell}.npy", scores_S2)

    def array(self, file: str) -> np.ndarray | None:
        """An array that was kept; None if there is none."""
        path = self.path / file
        return np.load(path) if path.is_file() else None

    def keep_array(self, file: str, array: np.ndarray) -> None:
        """Keeps an array, whole or not at all."""
        write_array(self.path / file, array)

    def figures(self, file: str) -> dict[str, Any]:
        """`SCORES_FILE` or `LIKELIHOOD_FILE`; empty where there is none yet."""
        return read_json(self.path / file) or {}

    def keep_figures(self, file: str, key: str, figures: dict[str, Any]) -> None:
        """Writes the figures under a key, beside those under others."""
        write_whole(self.path / file, to_json({**self.figures(file), key: figures}))
        self._write()

    def _samples_path(self, cell: Cell) -> Path:
        return self.path / "samples" / f"{cell.name}.npy"

    def _write(self) -> None:
        write_whole(self.path / FILE_NAME, to_json(self._record))


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away and evaluate again.") from None


def to_json(record: dict[str, Any]) -> str:
    """As it is written."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array in NumPy's format, whole or not at all; the same bytes for the same array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_path(path).open("wb") as stream:
        np.save(stream, array)
        stream.flush()
    put_in_place(path)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
