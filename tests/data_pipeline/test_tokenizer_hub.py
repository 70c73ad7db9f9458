"""Tokenizers of the Hugging Face hub, from a server on this machine that answers as the hub does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from tests.small_tokenizers import (
    END,
    byte_level,
    json_folder,
)


@pytest.fixture
def source(tmp_path) -> Path:
    """What the hub has of the model."""
    return json_folder(tmp_path / "gpt2_json", byte_level(), bos_token=END, eos_token=END)


@pytest.fixture
def hub(source, monkeypatch, tmp_path):
    """A server that answers as the hub does, with one model, `someone/gpt2`."""
    import huggingface_hub.constants as constants

    commit = "c0ffee" + "0" * 34

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            name = self.path.rpartition("/")[2]
            if self.path.startswith(f"/api/models/someone/gpt2/tree/{commit}"):
                sizes = {file.name: file.stat().st_size for file in source.iterdir()} | {
                    "model.safetensors": 9
                }
                tree = [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in sizes]
                body = json.dumps(tree).encode()
            elif self.path.startswith("/api/models/someone/gpt2"):
                body = json.dumps({"id": "someone/gpt2", "sha": commit}).encode()
            elif self.path.startswith(f"/someone/gpt2/resolve/{commit}/") and (source / name).exists():
                body = (source / name).read_bytes()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for header, value in {
                "ETag": f'"{name}"',
                "X-Repo-Commit": commit,
                "Content-Length": len(body),
            }.items():
                self.send_header(header, str(value))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub(hub, source, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer("someone/gpt2")
    ours = load_tokenizer(source)
    assert load_tokenizer("someone/gpt2", allow_hub=True).fingerprint == ours.fingerprint
    fetched = {file.name for file in (tmp_path / "hub").rglob("snapshots/*/*")}
    assert fetched == {"tokenizer.json", "tokenizer_config.json"}, "no weights"
    with pytest.raises(UserError, match=r"--tokenizer is someone/else, .* hub does not give it"):
        load_tokenizer("someone/else", setting="--tokenizer", allow_hub=True)
    hub.shutdown()
    hub.server_close()
    assert load_tokenizer("someone/gpt2", allow_hub=True).fingerprint == ours.fingerprint, "from the cache"
    with pytest.raises(UserError) as raised:
        load_tokenizer("someone/new", allow_hub=True)
    assert "\n" not in str(raised.value) and "local folder" in str(raised.value)


def test_what_can_be_no_name_on_the_hub():
    with pytest.raises(UserError, match="no local path"):
        load_tokenizer("a/b/c/d", allow_hub=True)
