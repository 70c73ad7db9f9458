"""Datasets of the hub, from a server on this machine that answers as the hub does, and from the cache without it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import pytest

NAME = "somebody/small-openwebtext"
COMMIT = "c" * 40
CARD = """---
configs:
- config_name: plain
  data_files: [{split: train, path: data/*.jsonl}]
dataset_info:
- config_name: plain
  splits: [{name: train, num_bytes: 9, num_examples: 100020}]
---
"""
FILES = {
    "README.md": CARD.encode(),
    "data/a.jsonl": b"".join(b'{"text": "document %d"}\n' % i for i in range(50_000)),
    "data/b.jsonl": b"".join(b'{"text": "document %d"}\n' % i for i in range(50_000, 100_020)),
}

READ = """
import json, sys
from imdm_scale.data.sources import SourceSpec, open_documents
from imdm_scale.errors import UserError

def seen(path, streaming):
    documents = [open_documents(SourceSpec(path, streaming=streaming), split) for split in ("train", "valid")]
    texts = [[text for batch in split.batches(0, 3000) for text in batch] for split in documents]
    return [[t.num_documents, t.identity, s[0], s[-1], len(s)] for t, s in zip(documents, texts)]

results = {}
for path in sys.argv[1:]:
    for streaming in (True, False):
        try:
            results[f"{path} {streaming}"] = seen(path, streaming)
        except UserError as error:
            results[f"{path} {streaming}"] = str(error)
print(json.dumps(results))
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that loading a dataset asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urlsplit(self.path).path
        resolve, tree, info = (
            f"/datasets/{NAME}/resolve/",
            f"/api/datasets/{NAME}/tree/{COMMIT}",
            f"/api/datasets/{NAME}/revision",
        )
        if path.startswith(resolve):
            file = path.removeprefix(resolve).partition("/")[2]
            if file not in FILES:
                return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return self.reply(200, FILES[file], ETag=f'"{digest(FILES[file])}"', X_Repo_Commit=COMMIT)
        if path.startswith(tree):
            return self.reply(200, json.dumps(listing(path.removeprefix(tree).strip("/"))).encode())
        if path.startswith(info):
            return self.reply(200, json.dumps({"id": NAME, "sha": COMMIT}).encode())
        return self.reply(401 if "/datasets/" in path else 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def digest(content):
    return hashlib.sha1(content).hexdigest()


def listing(folder):
    """What a folder of the repository holds, as the hub tells it."""
    entries = {}
    for file, content in FILES.items():
        if file.startswith(f"{folder}/" if folder else ""):
            inside = file[len(folder) + 1 if folder else 0 :].partition("/")
            path = f"{folder}/{inside[0]}".strip("/")
            kind = {"type": "directory", "size": 0} if inside[1] else {"type": "file", "size": len(content)}
            entries[path] = {"path": path, "oid": digest(content), **kind}
    return list(entries.values())


@contextmanager
def hub():
    """Yields the address of a hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(address, home, *paths):
    """What a process of its own, whose hub is at `address`, reads: the library looks for both once, at its import."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "USE_TORCH": "0",
    }  # torch takes long to import
    run = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def with_and_without(tmp_path_factory):
    """What is read while the hub answers, and afterwards."""
    home = tmp_path_factory.mktemp("home")
    with hub() as address:
        online = read(address, home, NAME, "somebody/nothing")
    return online, read(address, home, NAME, "somebody/nothing")


def test_openwebtext_as_the_literature_splits_it_streamed_or_not(with_and_without):
    online, _ = with_and_without
    train, valid = online[f"{NAME} True"]
    assert train[0] == train[4] == 20 and train[2:4] == ["document 0", "document 19"]
    assert valid[0] == valid[4] == 100_000 and valid[2:4] == ["document 20", "document 100019"]
    assert online[f"{NAME} False"] == [train, valid]


def test_without_the_hub_the_cache_serves_as_the_same_source(with_and_without):
    online, offline = with_and_without
    assert offline[f"{NAME} True"] == offline[f"{NAME} False"] == online[f"{NAME} True"]


def test_a_dataset_that_is_nowhere(with_and_without):
    online, offline = with_and_without
    for streaming in (True, False):
        key = f"somebody/nothing {streaming}"
        assert (
            "cannot be loaded from there (DatasetNotFoundError: Dataset 'somebody/nothing' doesn't"
            in online[key]
        )
        assert "the hub cannot be reached" in offline[key] and "nor is it in the cache" in offline[key]
