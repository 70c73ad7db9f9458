"""Shards against what the manifest says of them."""

from __future__ import annotations

import hashlib
import os
import threading
from io import BufferedReader

from imdm_scale.data.manifest import Shard
from imdm_scale.errors import UserError


class DamagedShard(UserError):
    """A shard that is missing, cannot be reached, or is not the one that the manifest names."""


def difference(shard: Shard, num_bytes: int, sha256: str) -> str | None:
    """In words, how a file of so many bytes and this hash differs from what the manifest says; None if it does not."""
    if num_bytes != shard.num_bytes:
        return f"its size is {num_bytes} bytes, but the manifest says {shard.num_bytes}"
    if sha256 != shard.sha256:
        return f"its SHA-256 is {sha256[:16]}..., but the manifest says {shard.sha256[:16]}..."
    return None


class Verified:
    """The shards that this process found whole."""

    def __init__(self) -> None:
        self._whole: set[Shard] = set()
        self._locks: dict[Shard, threading.Lock] = {}

    def add(self, shard: Shard) -> None:
        """Notes one that was compared in another way."""
        self._whole.add(shard)

    def damage(self, stream: BufferedReader, shard: Shard) -> str | None:
        """How an open file differs from the manifest, None if it does not; its bytes are read the first time only."""
        num_bytes = os.fstat(stream.fileno()).st_size
        # The background thread may be reading the same file: then wait for what it finds.
        with self._locks.setdefault(shard, threading.Lock()):
            if shard in self._whole or num_bytes != shard.num_bytes:
                return difference(shard, num_bytes, shard.sha256)
            damage = difference(shard, num_bytes, hashlib.file_digest(stream, "sha256").hexdigest())
            if damage is None:
                self._whole.add(shard)
        stream.seek(0)
        return damage
