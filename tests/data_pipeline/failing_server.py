"""A web server for a folder that fails on purpose."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Failure = Literal["error", "missing", "forbidden", "truncated", "short", "corrupt", "hang", "stall", "slow"]
"""What an answer does: status 500; 404; 403; half of what it announces; half of the file, announced as whole; one
byte changed; nothing at all; half of the file and then nothing; the file at `slow_rate`."""


class FailingServer:
    """Serves `folder` at `url` until the context ends.

    `failures[path]` are the failures of the next answers for that path, in order; after them it answers well.
    `requests[path]` counts all requests, and `in_progress` those that are being answered.
    """

    def __init__(self, folder: Path, slow_rate: int = 100_000) -> None:
        self.folder, self.slow_rate = folder, slow_rate
        self.failures: defaultdict[str, list[Failure]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.in_progress: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FailingServer:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: FailingServer, *args: object) -> None:
        self.owner = owner
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        with self.owner.lock:
            self.owner.requests[path] += 1
            self.owner.in_progress[path] += 1
            failure = self.owner.failures[path].pop(0) if self.owner.failures[path] else None
        try:
            self.answer(self.owner.folder / path, failure)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side has given up
        finally:
            with self.owner.lock:
                self.owner.in_progress[path] -= 1

    def answer(self, file: Path, failure: Failure | None) -> None:
        if failure == "hang":
            self.owner.ended.wait()
            return
        if failure == "error":
            self.send_error(500)
            return
        if failure == "forbidden":
            self.send_error(403)
            return
        if failure == "missing" or not file.is_file():
            self.send_error(404)
            return
        body = file.read_bytes()
        if failure == "corrupt":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if failure == "short":
            body = body[: len(body) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if failure in ("truncated", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if failure == "stall":
                self.owner.ended.wait()
            return
        step = len(body) if failure != "slow" else max(1, self.owner.slow_rate // 20)
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            if failure == "slow":
                time.sleep(0.05)
