"""The tokenizer: ids, round trips, the fingerprint, and the tool that makes it."""

from __future__ import annotations

import importlib.util
import io
import json
import string
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.corpus import read_documents
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

EMBEDDED = Tokenizer.load(None)


def trained(vocab_size, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=islice(read_documents(None, "valid"), 3),
        model_writer=model,
        vocab_size=vocab_size,
        max_sentence_length=1 << 20,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def test_ids_of_the_embedded_tokenizer():
    assert (EMBEDDED.vocab_size, EMBEDDED.mask_id) == (4097, 4096)
    assert (EMBEDDED.bos_id, EMBEDDED.eos_id) == (1, 2)
    assert EMBEDDED.encode("</s>") != [EMBEDDED.eos_id], "text must not be able to write a special id"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_document_of_the_corpus_survives_up_to_white_space(split):
    for document in islice(read_documents(None, split), 100):
        ids = EMBEDDED.encode(document)
        assert EMBEDDED.decode(ids) == " ".join(document.split())
        assert 0 not in ids, "a character of the corpus has no piece"


@given(st.text(st.sampled_from(string.printable)))
def test_ascii_survives_up_to_white_space(text):
    assert EMBEDDED.decode(EMBEDDED.encode(text)) == " ".join(text.split())


def test_decode_drops_specials_and_shows_masks():
    the, whale = EMBEDDED.encode("the"), EMBEDDED.encode("whale")
    mask = EMBEDDED.mask_id
    ids = [EMBEDDED.bos_id, *the, mask, mask, *whale, mask, EMBEDDED.eos_id]
    assert EMBEDDED.decode(ids) == "the _ _ whale _"
    assert EMBEDDED.decode([]) == ""


def test_fingerprint_follows_ids(tmp_path):
    EMBEDDED.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == EMBEDDED.fingerprint
    assert Tokenizer.load(tmp_path / "tokenizer.model").encode("Ishmael") == EMBEDDED.encode("Ishmael")
    base = Tokenizer(trained(200)).fingerprint
    assert Tokenizer(trained(200)).fingerprint == base
    assert Tokenizer(trained(201)).fingerprint != base, "other pieces"
    assert Tokenizer(trained(200, bos_id=2, eos_id=1)).fingerprint != base, "other special ids"


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"none\.model cannot be read"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        Tokenizer.load(tmp_path)
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"no model")
    with pytest.raises(UserError, match="no sentencepiece model"):
        Tokenizer.load(bad)
    bad.write_bytes(trained(200, bos_id=-1))
    with pytest.raises(UserError, match="with <s> and </s>"):
        Tokenizer.load(bad)


@pytest.fixture
def make_assets(monkeypatch):
    path = Path(__file__).parents[2] / "tools" / "make_assets.py"
    spec = importlib.util.spec_from_file_location("make_assets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VOCAB_SIZE", 400)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["make_assets.py", *map(str, arguments)])
        return module.main()

    return run


def test_make_assets_twice_gives_the_same_bytes(make_assets, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    records = [
        {"id": str(i), "source": "novel", "text": text}
        for i, text in enumerate(islice(read_documents(None, "valid"), 4))
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    names = ["corpus.train.jsonl.xz", "corpus.valid.jsonl.xz", "tokenizer.model"]
    for out in ("a", "b"):
        assert make_assets("--train", source, "--valid", source, "--out", out) == 0
        assert sorted(file.name for file in (tmp_path / out).iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "a")
    assert tokenizer.vocab_size == 401
    text = records[0]["text"] + "\t @ {~}"
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


def test_make_assets_names_a_bad_line(make_assets, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "0", "source": "s", "text": "t"}\n{"id": "1", "text": "t"}\n')
    assert make_assets("--train", source, "--valid", source, "--out", tmp_path) == 2
    assert "line 2" in capsys.readouterr().err
