"""What tests of sources share: a cache of their own, no network, and ways to read documents."""

from __future__ import annotations

import json
import socket

import datasets
import huggingface_hub
import pytest

from imdm_scale.data.sources import SourceSpec, open_documents


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Leaves the user's cache of `datasets` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses, and counts against the test, whatever leaves this machine."""
    attempts = []

    def connect(self, address, connect=socket.socket.connect):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            attempts.append(address)
            raise ConnectionRefusedError(address)
        return connect(self, address)

    def getaddrinfo(host, *args, getaddrinfo=socket.getaddrinfo, **kwargs):
        if host not in ("127.0.0.1", "::1"):
            attempts.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "no names here")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    # The libraries try the network, also where the environment says that there is none.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()
    assert not attempts


def jsonl(texts, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def read(spec, split="train", start=0, size=3):
    batches = list(open_documents(spec, split).batches(start, size))
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)
    return [text for batch in batches for text in batch]


def whole(path, **settings):
    """All documents of a local source, the same whether it is streamed or not."""
    spec = {"path": str(path), "train": "train", "valid": "none", **settings}
    streamed, mapped = read(SourceSpec(**spec, streaming=True)), read(SourceSpec(**spec))
    assert streamed == mapped
    return mapped


def both_splits(path, **settings):
    return tuple(read(SourceSpec(str(path), **settings), split) for split in ("train", "valid"))
