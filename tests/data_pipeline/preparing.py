"""What tests of the preparation share: a short text in the place of a corpus."""

from __future__ import annotations

import hashlib
import json
import lzma

import pytest

from imdm_scale.assets import CORPUS
from imdm_scale.data import prepare as prepare_module
from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from tests.data_pipeline.source_reading import own_cache

__all__ = ["own_cache"]

TOKENIZER = load_tokenizer(None)
SMALL = PrepareOptions(length=16, documents_per_group=20, shard_bytes=1000)


def texts_of(split):
    with lzma.open(CORPUS[split], "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


TEXTS = [text for document in texts_of("valid")[:12] for text in document.split("\n\n")][:90]
TEXTS[3], TEXTS[17] = "", " \n\t"


class FakeDocuments:
    """`sources.Documents` of a list."""

    def __init__(self, texts, identity="", num_documents=None):
        self.texts, self.num_documents = texts, num_documents
        self.identity = identity or hashlib.sha256(repr(texts).encode()).hexdigest()

    def batches(self, start, size):
        for first in range(start, len(self.texts), size):
            yield self.texts[first : first + size]


@pytest.fixture
def source(monkeypatch):
    """A function that sets the documents of the splits; by default some text in both. Small batches."""

    def texts(train=TEXTS, valid=TEXTS[:20], **how):
        documents = {
            name: given if given is None else FakeDocuments(given, **how)
            for name, given in (("train", train), ("valid", valid))
        }
        monkeypatch.setattr(prepare_module, "open_documents", lambda spec, split: documents[split])

    monkeypatch.setattr(prepare_module, "CHARACTERS_PER_BATCH", 500)
    monkeypatch.setattr(prepare_module, "ROWS_PER_READ", 7)
    texts()
    return texts


def prepared(out, options=SMALL, spec=SourceSpec("text"), tokenizer=TOKENIZER, **how):  # noqa: B008
    return prepare(spec, tokenizer, options, out, **how)


def files_of(folder):
    """Content of all files by name; folders have None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def report_always(monkeypatch):
    monkeypatch.setattr(prepare_module, "REPORT_SECONDS", 0)
