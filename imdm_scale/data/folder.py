"""A folder of prepared data, here or far away: its shards as verified memory maps.

A local folder is mapped in place. The shards of any other URL are fetched into a cache that the processes of a node
share (`cache.py`). Either way a shard is compared with the manifest before a process first uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np

from imdm_scale.data.background import Background
from imdm_scale.data.cache import ShardCache
from imdm_scale.data.fetch import FetchError, FetchSettings, check_driver, fetch_bytes, fetch_shard
from imdm_scale.data.manifest import FILE_NAME, TOKENIZER_FOLDER, Manifest, Shard
from imdm_scale.data.shards import map_shard
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.data.verified import DamagedShard, Verified
from imdm_scale.errors import UserError

__all__ = ["DamagedShard", "FetchSettings", "PreparedFolder"]

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
"""What `Tokenizer.save` may write, whatever the kind; a web server does not list its files."""
SKIP = "or set data.on_damage=skip to go on without it."
"""The remedy that is always left."""


class PreparedFolder:
    """Prepared data at a local path or a URL.

    Holds no map and no connection: a shard is let go when the caller drops its array. May be pickled and forked; each
    process has a thread, locks and a memory of its own of what it verified.

    Args:
        url: a local path (also as file://), or any URL that fsspec knows.
        manifest: the folder's own.
        fetch: how remote shards are fetched.
    """

    def __init__(self, url: str, manifest: Manifest, fetch: FetchSettings) -> None:
        self._local = _local_path(url)
        self.url = url.rstrip("/") if self._local is None else str(self._local)
        self.manifest, self.fetch = manifest, fetch
        self._process: _Process | None = None

    @classmethod
    def open(cls, url: str, fetch: FetchSettings) -> PreparedFolder:
        """Reads the manifest at `url`.

        Raises:
            UserError: no prepared data there, no way to read them, or a manifest that cannot be used.
        """
        folder = _local_path(url)
        url = url.rstrip("/") if folder is None else str(folder)
        text = _fetch_manifest(url, fetch) if folder is None else _read_manifest(folder)
        manifest = Manifest.from_json(text, url)
        for shard in (shard for split in manifest.splits.values() for shard in split.shards):
            if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it will name a file of the cache
                raise UserError(
                    f"{url}/{FILE_NAME} says of {shard.file} that its SHA-256 is {shard.sha256!r}, which is none; "
                    "prepare the data again with tools/prepare_data.py, or copy the folder again."
                )
        return cls(url, manifest, fetch)

    def required_bytes(self, split: str) -> int:
        """Size that the cache needs for streaming a split: two shuffle windows of its largest shards; 0 if local."""
        if self._local is not None:
            return 0
        sizes = sorted((shard.num_bytes for shard in self.manifest.splits[split].shards), reverse=True)
        return sum(sizes[: 2 * self.manifest.shuffle_window])

    def open_shard(self, shard: Shard) -> np.ndarray:
        """A shard's blocks, a read-only memory map (num_blocks, length) in the manifest's dtype.

        It is fetched first if need be, and compared with the manifest if this process uses it for the first time.

        Raises:
            DamagedShard: it is missing, cannot be reached, or differs from what the manifest says.
            UserError: the cache cannot take it.
        """
        with self._opened(shard) as stream:
            return self._map(stream, shard)

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Begins to fetch and verify some shards in the background, in this order, and returns at once.

        What an earlier call asked for and is not begun is forgotten. No more is fetched ahead than the cache can hold.
        A shard that fails is tried again when it is opened.
        """
        if self._local is None:
            room, fitting = self.fetch.cache_bytes, []
            for shard in shards:
                room -= shard.num_bytes
                if room < 0:
                    break
                fitting.append(shard)
            shards = fitting
        self._own().background.replace([partial(self._make_ready, shard) for shard in shards])

    def first_blocks(self, split: str, max_blocks: int, skip_damaged: bool = False) -> np.ndarray:
        """The first blocks of a split, at most `max_blocks`, in memory: (blocks, length) in the manifest's dtype.

        Args:
            skip_damaged: whether those of a shard that cannot be read are left out, with a warning.

        Raises:
            UserError: there is no such split; or as `open_shard`.
        """
        if split not in self.manifest.splits:
            raise UserError(
                f"{self.url} holds no split {split}, only {' and '.join(self.manifest.splits)}; prepare the data "
                "again with both splits."
            )
        missing = max_blocks
        parts = [np.empty((0, self.manifest.row_width), self.manifest.dtype)]
        for shard in self.manifest.splits[split].shards:
            if missing == 0:
                break
            try:
                parts.append(np.array(self.open_shard(shard)[:missing]))
            except DamagedShard as error:
                if not skip_damaged:
                    raise
                logger.warning("SKIPPED DATA: %s", error)
            else:
                missing -= len(parts[-1])
        return np.concatenate(parts)

    def tokenizer_folder(self) -> Path:
        """A local folder with the tokenizer's files: the data's own, or a copy in the cache, made once a node.

        Raises:
            UserError: the files cannot be fetched, or are not those of the tokenizer that the manifest names.
        """
        if self._local is not None:
            return self._local / TOKENIZER_FOLDER
        cache = self._own().cache
        name = hashlib.sha256(self.manifest.tokenizer.fingerprint.encode()).hexdigest()
        kept = cache.directory / "tokenizers" / name
        with cache.writing(), cache.lock(name):
            if not kept.is_dir():
                part = kept.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)  # of a process that died
                part.mkdir(parents=True)
                self._fetch_tokenizer(part)
                part.rename(kept)
        return kept

    def _fetch_tokenizer(self, directory: Path) -> None:
        where = f"{self.url}/{TOKENIZER_FOLDER}"
        try:
            for name in TOKENIZER_FILES:
                try:
                    (directory / name).write_bytes(
                        fetch_bytes(f"{where}/{name}", self.fetch, attempts_if_missing=1)
                    )
                except FetchError as error:
                    if not error.missing:
                        raise
        except FetchError as error:
            raise UserError(
                f"{where} cannot be fetched ({error}); check the address and the connection."
            ) from None
        found = load_tokenizer(directory, setting=where).fingerprint
        if found != self.manifest.tokenizer.fingerprint:
            raise UserError(
                f"{where} holds a tokenizer with the fingerprint {found[:16]}, but the ids were made by "
                f"{self.manifest.tokenizer.fingerprint[:16]}; copy the folder there again."
            )

    def _opened(self, shard: Shard) -> BufferedReader:
        """The open file of a shard that is whole."""
        own = self._own()
        if self._local is not None:
            return self._open_local(self._local / shard.file, shard, own.verified)
        while True:
            stream = own.cache.open(shard, partial(self._fetch_shard, shard))
            damage = own.verified.damage(stream, shard)
            if damage is None:
                return stream
            stream.close()
            logger.warning("%s in the cache is damaged (%s) and is fetched again", shard.file, damage)
            own.cache.discard(shard)

    def _make_ready(self, shard: Shard) -> None:
        self._opened(shard).close()

    def _open_local(self, file: Path, shard: Shard, verified: Verified) -> BufferedReader:
        remedy = f"copy it again from where it was made, {SKIP}"
        try:
            stream = file.open("rb")
        except FileNotFoundError:
            raise DamagedShard(f"{file} is missing; {remedy}") from None
        except OSError as error:
            raise DamagedShard(f"{file} cannot be read ({error.strerror}); {remedy}") from None
        try:
            damage = verified.damage(stream, shard)
        except OSError as error:
            damage = f"it cannot be read, {error.strerror}"
        if damage is not None:
            stream.close()
            raise DamagedShard(f"{file} is damaged: {damage}; {remedy}")
        return stream

    def _fetch_shard(self, shard: Shard, stream: BinaryIO) -> None:
        try:
            fetch_shard(f"{self.url}/{shard.file}", shard, stream, self.fetch)
        except FetchError as error:
            raise DamagedShard(
                f"{self.url}/{shard.file} cannot be fetched ({error}); check the connection, copy it there again, "
                f"{SKIP}"
            ) from None
        self._own().verified.add(shard)

    def _map(self, stream: BufferedReader, shard: Shard) -> np.ndarray:
        try:
            return map_shard(stream, shard.num_blocks, self.manifest.row_width, self.manifest.dtype)
        except ValueError:
            raise DamagedShard(
                f"{self.url}/{shard.file} is no array of {self.manifest.dtype} with {shard.num_blocks} x "
                f"{self.manifest.row_width} ids, as the manifest says; prepare the data again, {SKIP}"
            ) from None

    def _own(self) -> _Process:
        """What belongs to this process; a child that was forked makes its own."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process(self.fetch)
        return self._process

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedFolder, (self.url, self.manifest, self.fetch)


class _Process:
    """What a folder has in one process."""

    def __init__(self, fetch: FetchSettings) -> None:
        self.pid = os.getpid()
        self.verified = Verified()
        self.background = Background()
        self._fetch = fetch
        self._cache: ShardCache | None = None

    @property
    def cache(self) -> ShardCache:
        """The cache; its folder is made when it is first needed."""
        if self._cache is None:
            self._cache = ShardCache(self._fetch.cache_dir, self._fetch.cache_bytes)
        return self._cache


def _local_path(url: str) -> Path | None:
    """The path that `url` names if it is one."""
    if "://" not in url:
        return Path(url)
    if url.startswith(("file://", "local://")):
        return Path(fsspec.core.strip_protocol(url))
    return None


WHAT = (
    f"a folder of prepared data holds {FILE_NAME}, which is written last; name such a folder that you may read, or "
    "make one with tools/prepare_data.py."
)
"""The remedy where there is no manifest."""


def _read_manifest(folder: Path) -> bytes:
    try:
        return (folder / FILE_NAME).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / FILE_NAME} cannot be read ({error.strerror}); {WHAT}") from None


def _fetch_manifest(url: str, fetch: FetchSettings) -> bytes:
    check_driver(url)
    try:
        return fetch_bytes(f"{url}/{FILE_NAME}", fetch, check=json.loads)
    except FetchError as error:
        remedy = WHAT if error.missing else "check the address and the connection."
        raise UserError(f"{url}/{FILE_NAME} cannot be fetched ({error}); {remedy}") from None
