"""Documents to blocks of equal length, kept in a cache of memory-mapped files."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np

from imdm_scale.data.corpus import Split, corpus_hash, read_documents
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout of the blocks; raise it whenever `pack` gives other blocks for the same input."""


def pack(documents: Iterable[list[int]], length: int, bos_id: int, eos_id: int) -> np.ndarray:
    """Packs documents (lists of token ids) into blocks, int32 (number of blocks, length).

    Each document gets an EOS at its end; all are concatenated and cut into chunks of length - 2; a block is
    BOS, a chunk, EOS. This is the wrapped layout of masked diffusion language models (MDLM, arXiv
    2406.07524), except that only the end of the whole corpus is dropped, not that of every 1000 documents.

    Raises:
        ValueError: `length` is below 3, which leaves no room for text.
    """
    if length < 3:
        raise ValueError(f"a block of {length} tokens has no room for text between BOS and EOS")
    parts = [np.array([*document, eos_id], dtype=np.int32) for document in documents]
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    num_blocks = len(tokens) // (length - 2)
    blocks = np.empty((num_blocks, length), dtype=np.int32)
    blocks[:, 0] = bos_id
    blocks[:, 1:-1] = tokens[: num_blocks * (length - 2)].reshape(num_blocks, length - 2)
    blocks[:, -1] = eos_id
    return blocks


def prepare_blocks(
    path: Path | None, split: Split, tokenizer: Tokenizer, length: int, cache_dir: Path
) -> np.ndarray:
    """The packed blocks of one split of a corpus, memory-mapped read-only int32 (number of blocks, length).

    They are read from `cache_dir` if it holds those of the same corpus, tokenizer, length and split, and
    made and stored there otherwise. The file takes its name only when it is whole, so that any number of
    processes may prepare the same blocks at once.

    Raises:
        UserError: as `read_documents`; or the cache cannot be written; or the text does not fill one block.
    """
    corpus = corpus_hash(path, split)
    key = {
        "format": FORMAT,
        "corpus": corpus,
        "tokenizer": tokenizer.fingerprint,
        "length": length,
        "split": split,
    }
    stem = f"{split}-{length}-{corpus[:16]}-{tokenizer.fingerprint[:16]}"
    array_file, header_file = cache_dir / f"{stem}.npy", cache_dir / f"{stem}.json"
    blocks = _read_cache(array_file, header_file, key)
    if blocks is not None:
        return blocks
    documents = map(tokenizer.encode, read_documents(path, split))
    blocks = pack(documents, length, tokenizer.bos_id, tokenizer.eos_id)
    if len(blocks) == 0:
        raise UserError(
            f"The {split} part of {path or 'the embedded corpus'} does not fill one block of {length} "
            "tokens; give more text in data.path, or shorten the blocks."
        )
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _write_whole(array_file, lambda stream: np.save(stream, blocks))
        header = json.dumps({**key, "num_blocks": len(blocks)}, indent=1).encode()
        _write_whole(header_file, lambda stream: stream.write(header))
    except OSError as error:
        raise UserError(
            f"The prepared data cannot be written to {cache_dir} ({error.strerror}); "
            "free space, or choose another folder."
        ) from None
    return np.load(array_file, mmap_mode="r")


def _read_cache(array_file: Path, header_file: Path, key: dict[str, object]) -> np.ndarray | None:
    """The cached blocks; None if there are none, or if they are not what their header and `key` say."""
    try:
        header = json.loads(header_file.read_bytes())
        blocks = np.load(array_file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s) and is made again", array_file, error)
        return None
    if header != {**key, "num_blocks": len(blocks)} or blocks.shape[1:] != (key["length"],):
        logger.warning("%s does not belong to this corpus and tokenizer and is made again", array_file)
        return None
    return blocks


def _write_whole(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls write(stream) on a temporary file beside `file`, flushes it to disk and gives it its name."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        try:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise
