"""A small folder of prepared data, made without the code that prepares."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from imdm_scale.data.manifest import (
    FILE_NAME,
    FORMAT,
    TOKENIZER_FOLDER,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
)
from imdm_scale.data.tokenizer import load_tokenizer

LENGTH = 16
BLOCKS = 32
"""Of a shard."""


def write_small_folder(folder: Path, num_train: int = 4, num_valid: int = 1) -> Manifest:
    """Writes shards of random ids, the packaged tokenizer and the manifest."""
    generator = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", num_train), ("valid", num_valid)):
        (folder / name).mkdir(parents=True)
        shards = []
        for index in range(count):
            file = folder / name / f"{index:05}.npy"
            np.save(file, generator.integers(0, 1000, (BLOCKS, LENGTH), dtype=np.uint16))
            content = file.read_bytes()
            shards.append(
                Shard(f"{name}/{file.name}", BLOCKS, len(content), hashlib.sha256(content).hexdigest())
            )
        if shards:
            splits[name] = Split(count, count * BLOCKS * LENGTH, 0, tuple(shards))
    tokenizer = load_tokenizer(None)
    (folder / TOKENIZER_FOLDER).mkdir()
    tokenizer.save(folder / TOKENIZER_FOLDER)
    manifest = Manifest(FORMAT, LENGTH, "uint16", 2, TokenizerRecord.of(tokenizer), {}, {}, splits)
    (folder / FILE_NAME).write_text(manifest.to_json())
    return manifest


def blocks_of(folder: Path, shard: Shard) -> np.ndarray:
    """The blocks of a shard, by NumPy's own reader."""
    return np.load(folder / shard.file)
