"""Training a tokenizer: the same bytes every time, whatever text, and the tool that makes the packaged one."""

from __future__ import annotations

import importlib.util
import json
import os
import string
from pathlib import Path

import pytest

from imdm_scale.data.sentencepiece_tokenizer import SentencePieceTokenizer
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.data.tokenizer_training import (
    MAX_SENTENCE_BYTES,
    MAX_SENTENCE_CHARACTERS,
    train_sentencepiece,
)
from imdm_scale.errors import UserError
from tests.small_tokenizers import texts

TEXTS = texts()[:4]


@pytest.mark.parametrize(
    "options",
    [{}, {"model_type": "bpe"}, {"byte_fallback": True}, {"num_threads": 2}, {"max_sentences": 20}],
    ids=lambda options: ",".join(options) or "default",
)
def test_two_runs_give_the_same_bytes(options, tmp_path, monkeypatch):
    model = train_sentencepiece(iter(TEXTS), 400, **options)
    monkeypatch.chdir(tmp_path)
    assert train_sentencepiece(TEXTS, 400, **options) == model
    assert Path.cwd() == tmp_path and not any(tmp_path.iterdir())
    tokenizer = SentencePieceTokenizer(model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (401, 1, 2, 400)
    text = TEXTS[0] + " \t" + "".join(sorted(set(string.printable)))
    if "max_sentences" not in options:
        assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())
    if options:
        assert model != train_sentencepiece(TEXTS, 400)


def test_bytes_stand_for_what_the_corpus_does_not_have():
    known, unknown = TEXTS[0], "汉字 Ω"
    with_bytes = SentencePieceTokenizer(train_sentencepiece(TEXTS, 400, byte_fallback=True))
    assert with_bytes.decode(with_bytes.encode(known + unknown)) == " ".join((known + unknown).split())
    without = SentencePieceTokenizer(train_sentencepiece(TEXTS, 400))
    assert 0 in without.encode(unknown) and 0 not in with_bytes.encode(unknown)


def test_a_sample_that_is_large_enough_is_the_whole_text():
    assert train_sentencepiece(TEXTS, 400, max_sentences=10**6) == train_sentencepiece(TEXTS, 400)


def test_a_sample_is_spread_over_the_text():
    words = [letter * 3 for letter in string.ascii_uppercase]
    corpus = [f"{word} {word}\n" * 50 for word in words]
    tokenizer = SentencePieceTokenizer(train_sentencepiece(corpus, 110, max_sentences=200))
    pieces = {tokenizer.token(i) for i in range(110)}
    learned = {piece[1] for piece in pieces if piece.startswith("▁") and len(piece) > 1}
    assert learned & set("ABCDEFGHIJKLM") and learned & set("NOPQRSTUVWXYZ")


def test_texts_are_read_where_the_caller_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(TEXTS):
        Path(f"{number}.txt").write_text(text)
    files = (Path(f"{number}.txt").read_text() for number in range(len(TEXTS)))
    assert train_sentencepiece(files, 400) == train_sentencepiece(TEXTS, 400)


def test_a_paragraph_without_end_is_cut_and_not_dropped():
    assert 4 * MAX_SENTENCE_CHARACTERS <= MAX_SENTENCE_BYTES
    line = " ".join(" ".join(texts()).split())
    assert len(line) > 2 * MAX_SENTENCE_CHARACTERS
    parts = [line[i : i + MAX_SENTENCE_CHARACTERS] for i in range(0, len(line), MAX_SENTENCE_CHARACTERS)]
    assert train_sentencepiece([line], 400) == train_sentencepiece(parts, 400)


def test_lone_surrogates_are_no_obstacle():
    assert train_sentencepiece([*TEXTS, "a \ud83d b"], 400)


def test_sizes_that_cannot_be_are_answered_with_those_that_can():
    with pytest.raises(UserError, match=r"--vocab-size is 90000, .* no more than (\d+) pieces") as raised:
        train_sentencepiece(TEXTS[:1], 90000)
    largest = int(str(raised.value).partition("no more than ")[2].split()[0])
    assert train_sentencepiece(TEXTS[:1], largest)
    with pytest.raises(UserError, match=f"no more than {largest} "):
        train_sentencepiece(TEXTS[:1], largest + 1)
    with pytest.raises(UserError, match=r"--vocab-size is 20, .* set it above (\d+)") as raised:
        train_sentencepiece(TEXTS, 20)
    above = int(str(raised.value).rpartition("above ")[2].rstrip("."))
    assert train_sentencepiece(TEXTS, above + 1)
    with pytest.raises(UserError, match="--vocab-size 0"):
        train_sentencepiece(TEXTS, 0)


@pytest.mark.parametrize("nothing", [[], ["", " \n\t"]])
def test_no_text(nothing):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_sentencepiece(nothing, 400)


def test_what_goes_wrong_in_the_text_is_not_hidden():
    def documents():
        yield TEXTS[0]
        raise UserError("page 2 is torn")

    start = os.getcwd()
    with pytest.raises(UserError, match="page 2 is torn"):
        train_sentencepiece(documents(), 400)
    assert os.getcwd() == start


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
    records = [{"id": str(i), "source": "novel", "text": text} for i, text in enumerate(TEXTS)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    names = ["corpus.train.jsonl.xz", "corpus.valid.jsonl.xz", "tokenizer.model"]
    for out in ("a", "b"):
        assert make_assets("--train", source, "--valid", source, "--out", out) == 0
        assert sorted(file.name for file in (tmp_path / out).iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 401
    text = records[0]["text"] + "\t @ {~}"
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


def test_make_assets_names_a_bad_line(make_assets, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "0", "source": "s", "text": "t"}\n{"id": "1", "text": "t"}\n')
    assert make_assets("--train", source, "--valid", source, "--out", tmp_path) == 2
    assert "line 2" in capsys.readouterr().err


def test_make_assets_says_when_there_is_too_little_text(make_assets, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "0", "source": "s", "text": "t"}\n')
    assert make_assets("--train", source, "--valid", source, "--out", tmp_path / "out") == 2
    assert "no more than" in capsys.readouterr().err and not (tmp_path / "out").exists()
