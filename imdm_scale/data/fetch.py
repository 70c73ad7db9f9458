"""One remote file, fetched with patience: a limit on silence, a check of what came, retries with back-off.

Any file system that fsspec knows will do. Each attempt makes its own: they survive neither a fork nor a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.registry import known_implementations

from imdm_scale.data.manifest import Shard
from imdm_scale.data.verified import difference
from imdm_scale.errors import UserError

logger = logging.getLogger(__name__)

LONGEST_DELAY = 60.0
"""Seconds; the delay between attempts is doubled up to here."""
ATTEMPTS_IF_MISSING = 2
"""Attempts, at most, for a file that the other side says it does not have."""
CHUNK_BYTES = 8 << 20
"""Largest piece that is asked for at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class FetchSettings:
    """How remote data are fetched, and where they are kept."""

    cache_dir: Path
    """Folder on this node in which remote files are kept."""
    cache_bytes: int
    """Largest size of the shards in it."""
    attempts: int = 5
    """Attempts at a file before it counts as damaged."""
    first_delay: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""
    timeout: float = 60.0
    """Seconds without a byte after which an attempt has failed."""


class FetchError(Exception):
    """All attempts failed."""

    def __init__(self, reason: str, attempts: int, missing: bool) -> None:
        super().__init__(reason, attempts, missing)
        self.reason = reason
        """Why the last attempt failed."""
        self.attempts = attempts
        """How many there were."""
        self.missing = missing
        """Whether the other side answered that there is no such file, at least for us."""

    def __str__(self) -> str:
        return f"{self.attempts} attempt{'s' * (self.attempts > 1)}, the last: {self.reason}"


class _Failed(Exception):
    """One attempt failed, for the reason given."""


class _Missing(_Failed):
    """One attempt failed because there is no such file, or because we may not read it.

    The two belong together: stores of objects do not tell those who may not list a folder what is not in it.
    """


def check_driver(url: str) -> None:
    """Checks that this installation can read such a URL.

    Raises:
        UserError: it cannot; says what to install.
    """
    protocol = url.split("://")[0].split("::")[-1]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise UserError(
            f"{url} begins with {protocol}://, which is no protocol that fsspec knows; name a local folder, or a "
            "URL that begins with https://, s3://, gs:// or hf://."
        ) from None
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        package = f"fsspec[{protocol}]" if package == "fsspec" else package
        raise UserError(
            f"{url} needs a driver that is not installed ({error}); run: pip install '{package}'"
        ) from None


def fetch_bytes(
    url: str,
    settings: FetchSettings,
    check: Callable[[bytes], object] = len,
    attempts_if_missing: int = ATTEMPTS_IF_MISSING,
) -> bytes:
    """The content of a small remote file.

    Args:
        check: raises ValueError for a content that cannot be right; the attempt then counts as failed.

    Raises:
        FetchError: no attempt succeeded.
    """

    def receive(chunks: Iterator[bytes]) -> bytes:
        content = b"".join(chunks)
        try:
            check(content)
        except ValueError as error:
            raise _Failed(f"the content of {len(content)} bytes is damaged, {error}") from None
        return content

    return _with_retries(url, receive, settings, attempts_if_missing)


def fetch_shard(url: str, shard: Shard, stream: BinaryIO, settings: FetchSettings) -> None:
    """Writes a remote shard to the beginning of `stream` and compares it with the manifest on the way.

    Raises:
        FetchError: no attempt brought the bytes that the manifest names.
        OSError: `stream` cannot be written.
    """

    def receive(chunks: Iterator[bytes]) -> None:
        stream.seek(0)
        digest, num_bytes = hashlib.sha256(), 0
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > shard.num_bytes:
                raise _Failed(f"its size is above {shard.num_bytes} bytes, which the manifest says")
            digest.update(chunk)
            stream.write(chunk)
        if damage := difference(shard, num_bytes, digest.hexdigest()):
            raise _Failed(damage)
        stream.flush()

    _with_retries(url, receive, settings, ATTEMPTS_IF_MISSING)


def _with_retries(
    url: str, receive: Callable[[Iterator[bytes]], T], settings: FetchSettings, attempts_if_missing: int
) -> T:
    """What `receive` makes of the file's chunks, in the first attempt in which it does not raise _Failed."""
    delay, attempt = settings.first_delay, 0
    while True:
        attempt += 1
        try:
            with contextlib.closing(_read(url, settings.timeout)) as chunks:
                return receive(chunks)
        except _Failed as failure:
            reason, missing = str(failure), isinstance(failure, _Missing)
        attempts = min(settings.attempts, attempts_if_missing) if missing else settings.attempts
        if attempt >= attempts:
            raise FetchError(reason, attempt, missing) from None
        logger.warning(
            "%s: attempt %d of %d failed (%s); trying again in %g s", url, attempt, attempts, reason, delay
        )
        time.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY)


def _read(url: str, timeout: float) -> Generator[bytes, None, None]:
    """Yields the chunks of a remote file.

    A thread of its own reads, because no time-out of a file system's is to be relied upon: a thread that hears nothing
    is left behind, and ends with its connection or with the process. It also reads while the caller hashes and writes.

    Raises:
        _Missing: there is no such file.
        _Failed: anything else went wrong, or nothing came for `timeout` seconds.
    """
    chunks: queue.Queue[bytes | Exception] = queue.Queue(maxsize=2)
    left_behind = threading.Event()

    def read() -> None:
        try:
            storage_options, open_options = _options(url, timeout)
            # A file system of its own: fsspec would keep those of all threads that ever were.
            files, path = fsspec.url_to_fs(url, skip_instance_cache=True, **storage_options)
            with files.open(path, "rb", **open_options) as stream:
                while (chunk := stream.read(CHUNK_BYTES)) and not left_behind.is_set():
                    chunks.put(chunk)
            chunks.put(b"")
        except Exception as error:
            chunks.put(error)

    threading.Thread(target=read, name=f"fetch {url}", daemon=True).start()
    try:
        while chunk := _get(chunks, timeout):
            yield chunk
    finally:
        left_behind.set()
        with contextlib.suppress(queue.Empty):
            while True:  # make room for a last put
                chunks.get_nowait()


def _get(chunks: queue.Queue[bytes | Exception], timeout: float) -> bytes:
    try:
        item = chunks.get(timeout=timeout)
    except queue.Empty:
        item = TimeoutError()
    if isinstance(item, bytes):
        return item
    if isinstance(item, FileNotFoundError):
        raise _Missing("there is no such file")
    if isinstance(item, TimeoutError):
        raise _Failed(f"nothing came for {timeout:g} s")
    words = " ".join(str(item).split())
    reason = f"{type(item).__name__}: {words[:300]}" if words else type(item).__name__
    refused = isinstance(item, PermissionError) or getattr(item, "status", None) in (401, 403, 410)
    raise _Missing(reason) if refused else _Failed(reason)


def _options(url: str, timeout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options with which to make the file system and to open the file, so that it is read once, front to back."""
    protocol = url.split("://")[0]
    if protocol in ("http", "https"):
        import aiohttp

        client_kwargs = {
            "trust_env": True,  # proxies
            "read_bufsize": 1 << 20,
            **fsspec.config.conf.get(protocol, {}).get("client_kwargs", {}),
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
        }
        # One GET and nothing else. Without a size fsspec first asks for it, and takes a failure for a missing file.
        return {"client_kwargs": client_kwargs}, {"block_size": 0, "size": 1}
    if protocol == "hf":
        return {}, {"block_size": 0}
    return {}, {"cache_type": "none"}  # each chunk is one request
