"""Synthetic tasks as data: from what `data.path` says to a folder of prepared data.

    synthetic://all_equal?vocab_size=32
    synthetic://hmm?vocab_size=32&states=8&concentration=0.3&law_seed=0&seed=0&train=100000&valid=2000

A sequence is a block, of `model.length` ids, with nothing before or after it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import tokenizers
from tokenizers import models, pre_tokenizers

from imdm_scale.config.nearest import did_you_mean
from imdm_scale.config.ranges import Range
from imdm_scale.data.durable import write_whole
from imdm_scale.data.huggingface_tokenizer import HuggingFaceTokenizer
from imdm_scale.data.manifest import FILE_NAME, FORMAT, TOKENIZER_FOLDER, Manifest, Split, TokenizerRecord
from imdm_scale.data.output_folder import alone_in, finished_manifest, tidy, writing
from imdm_scale.data.shards import ShardWriter, shard_dtype
from imdm_scale.data.synthetic import AllEqual, HiddenMarkov, SyntheticTask
from imdm_scale.data.tokenizer import MASK_TOKEN
from imdm_scale.errors import UserError

SCHEME = "synthetic"
BOUNDARY_TOKEN = "[END]"
"""A tokenizer must have a BOS and an EOS; this one is both, and occurs in no block."""
FIRST_SAMPLE = {"train": 0, "valid": 1 << 40}
"""Number of each split's first sample: far apart, so that no number of blocks makes them meet."""
SHARD_BYTES = 64 * 2**20
BLOCKS_AT_A_TIME = 1 << 16


class Parameter(NamedTuple):
    """A parameter of a task in `data.path`."""

    default: float
    """The number taken where it is not named; an integer's type means that only integers are allowed."""
    allowed: Range


COMMON = {
    "vocab_size": Parameter(32, Range(2)),
    "seed": Parameter(0, Range(0)),
    "train": Parameter(100_000, Range(1)),
    "valid": Parameter(2_000, Range(1)),
}
TASKS: dict[str, dict[str, Parameter]] = {
    "all_equal": COMMON,
    "hmm": {
        **COMMON,
        "states": Parameter(8, Range(1)),
        "concentration": Parameter(0.3, Range(0, above_low=True)),
        "law_seed": Parameter(0, Range(0)),
    },
}
"""The tasks by name, with their parameters; `AllEqual` and `HiddenMarkov` explain them."""


@dataclass(frozen=True)
class SyntheticSource:
    """A task and how much of it."""

    task: SyntheticTask
    seed: int
    """Seed of the samples."""
    num_blocks: dict[str, int]
    """Sequences of each split."""

    @property
    def description(self) -> dict[str, Any]:
        """Everything that decides about the blocks, for the manifest."""
        return {
            "task": type(self.task).__name__,
            **dataclasses.asdict(self.task),
            "seed": self.seed,
            **self.num_blocks,
        }


def is_synthetic(path: str | None) -> bool:
    """Whether an entry of `data.path` names a synthetic task."""
    return path is not None and path.startswith(f"{SCHEME}://")


def synthetic_source(path: str, length: int) -> SyntheticSource:
    """The task that an entry of `data.path` names, with sequences of `length` ids.

    Raises:
        UserError: an unknown task or parameter, or a value out of range.
    """
    parts = urlsplit(path)
    if parts.netloc not in TASKS:
        tasks = f"its tasks are {' and '.join(TASKS)}."
        raise UserError(f"data.path is {path}, no synthetic task; {did_you_mean(parts.netloc, TASKS, tasks)}")
    parameters = TASKS[parts.netloc]
    values = {name: parameter.default for name, parameter in parameters.items()}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in parameters:
            known = f"its parameters are {', '.join(parameters)}."
            raise UserError(
                f"data.path is {path}, but {parts.netloc} has no parameter {name}; "
                f"{did_you_mean(name, parameters, known)}"
            )
        values[name] = _number(path, name, text, parameters[name])
    if length < 2:
        raise UserError(
            f"model.length is {length}, but a synthetic task needs sequences of at least 2 ids; set it so."
        )
    shape = {"vocab_size": int(values["vocab_size"]), "length": length}
    task: SyntheticTask
    if parts.netloc == "all_equal":
        task = AllEqual(**shape)
    else:
        task = HiddenMarkov(
            **shape,
            num_states=int(values["states"]),
            concentration=float(values["concentration"]),
            law_seed=int(values["law_seed"]),
        )
    return SyntheticSource(task, int(values["seed"]), {split: int(values[split]) for split in FIRST_SAMPLE})


def id_tokenizer(vocab_size: int) -> HuggingFaceTokenizer:
    """A tokenizer that spells the ids 0 to vocab_size - 1 as numbers with spaces between them.

    Two more ids follow: BOS and EOS in one, and the mask. A word that is no such number is read as the former.
    """
    numbers = [str(i) for i in range(vocab_size)]
    vocabulary = {word: i for i, word in enumerate([*numbers, BOUNDARY_TOKEN, MASK_TOKEN])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=BOUNDARY_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([BOUNDARY_TOKEN, MASK_TOKEN])
    return HuggingFaceTokenizer(
        backend.to_str(),
        {"bos_token": BOUNDARY_TOKEN, "eos_token": BOUNDARY_TOKEN, "mask_token": MASK_TOKEN},
    )


def prepare_synthetic(source: SyntheticSource, out: Path) -> Manifest:
    """Writes the blocks of both splits to `out`; where it holds exactly these already, they stay.

    Raises:
        UserError: `out` holds something else, is being prepared by another process or cannot be written.
    """
    tokenizer = id_tokenizer(source.task.vocab_size)
    plan = Manifest(
        format=FORMAT,
        length=source.task.length,
        dtype=shard_dtype(tokenizer.vocab_size),
        shuffle_window=8,
        tokenizer=TokenizerRecord.of(tokenizer),
        source=source.description,
        options={"packing": "plain", "shard_bytes": SHARD_BYTES},
        splits={},
    )
    finished = finished_manifest(out, plan)
    if finished is not None:
        return finished
    with alone_in(out), writing(out):
        splits = {split: _write_split(source, split, plan, out) for split in FIRST_SAMPLE}
        shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
        tokenizer.save(out / TOKENIZER_FOLDER)
        manifest = dataclasses.replace(plan, splits=splits)
        write_whole(out / FILE_NAME, manifest.to_json())
        tidy(out)
    return manifest


def _number(path: str, name: str, text: str, parameter: Parameter) -> float:
    """The value of a parameter."""
    kind = type(parameter.default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not parameter.allowed.holds(value) or value == math.inf:
        what = "an integer" if kind is int else "a number"
        raise UserError(
            f"data.path is {path}, but {name} must be {what}, {parameter.allowed}; for example {parameter.default:g}."
        )
    return value


def _write_split(source: SyntheticSource, split: str, plan: Manifest, out: Path) -> Split:
    writer = ShardWriter(out / split, plan.length, plan.dtype, SHARD_BYTES)
    first, end = FIRST_SAMPLE[split], FIRST_SAMPLE[split] + source.num_blocks[split]
    shards = []
    for start in range(first, end, BLOCKS_AT_A_TIME):
        count = min(BLOCKS_AT_A_TIME, end - start)
        shards += writer.write(source.task.samples(source.seed, start, count))
    shards += writer.finish()
    return Split(end - first, (end - first) * plan.length, 0, tuple(shards))
