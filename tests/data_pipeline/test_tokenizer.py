"""Sentencepiece tokenizers: ids, round trips, special tokens, the fingerprint, files."""

from __future__ import annotations

import io
import json
import os
import pickle
import string
import threading

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.assets import TEACHER, TOKENIZER
from imdm_scale.data.sentencepiece_tokenizer import SentencePieceTokenizer
from imdm_scale.data.tokenizer import holds_tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from tests.small_tokenizers import byte_level, embedded_texts, json_folder, texts

EMBEDDED = load_tokenizer(None)


def trained(vocab_size, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()[:3]),
        model_writer=model,
        vocab_size=vocab_size,
        max_sentence_length=1 << 20,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def test_ids_of_the_embedded_tokenizer():
    assert (EMBEDDED.kind, EMBEDDED.vocab_size, EMBEDDED.mask_id) == ("sentencepiece", 4097, 4096)
    assert (EMBEDDED.bos_id, EMBEDDED.eos_id) == (1, 2)
    assert [EMBEDDED.token(i) for i in (0, 1, 2, 4096)] == ["<unk>", "<s>", "</s>", "[MASK]"]
    with pytest.raises(IndexError):
        EMBEDDED.token(4097)


def test_the_embedded_teacher_has_the_fingerprint_of_the_embedded_tokenizer():
    config = json.loads((TEACHER / "config.json").read_text())
    assert EMBEDDED.fingerprint == config["tokenizer_fingerprint"]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_document_of_the_corpus_survives_up_to_white_space(split):
    documents = embedded_texts(split, 100)
    batch = EMBEDDED.encode_batch(documents)
    assert len(documents) >= 40 and batch == [EMBEDDED.encode(document) for document in documents]
    for document, ids in zip(documents, batch, strict=True):
        assert EMBEDDED.decode(ids) == " ".join(document.split())
        assert 0 not in ids, "a character of the corpus has no piece"


@given(st.text(st.sampled_from(string.printable)))
def test_ascii_survives_up_to_white_space(text):
    assert EMBEDDED.decode(EMBEDDED.encode(text)) == " ".join(text.split())


@given(st.lists(st.sampled_from(["</s>", "<s>", "[MASK]", "<unk>", "<mask>", " ", "a"])).map("".join))
def test_text_writes_no_special_token(text):
    assert not {EMBEDDED.bos_id, EMBEDDED.eos_id, EMBEDDED.mask_id} & set(EMBEDDED.encode(text))


def test_lone_surrogates_are_replaced():
    assert EMBEDDED.encode_batch(["a\ud83db"]) == [EMBEDDED.encode("a\ufffdb")]


def test_a_batch_is_encoded_by_this_thread():
    counts, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            counts.add(len(os.listdir("/proc/self/task")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    while not counts:
        pass
    before = max(counts)
    counts.clear()
    EMBEDDED.encode_batch(embedded_texts("train", 100))
    done.set()
    watcher.join()
    assert counts == {before}


def test_decode_drops_specials_and_shows_masks():
    the, whale = EMBEDDED.encode("the"), EMBEDDED.encode("whale")
    mask = EMBEDDED.mask_id
    ids = [EMBEDDED.bos_id, *the, mask, mask, *whale, mask, EMBEDDED.eos_id]
    assert EMBEDDED.decode(ids) == "the _ _ whale _"
    assert EMBEDDED.decode([]) == ""


def test_fingerprint_follows_ids(tmp_path):
    EMBEDDED.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert load_tokenizer(tmp_path).fingerprint == EMBEDDED.fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.model").encode("Ishmael") == EMBEDDED.encode("Ishmael")
    base = SentencePieceTokenizer(trained(200)).fingerprint
    assert SentencePieceTokenizer(trained(200)).fingerprint == base
    assert SentencePieceTokenizer(trained(201)).fingerprint != base, "other pieces"
    assert SentencePieceTokenizer(trained(200, bos_id=2, eos_id=1)).fingerprint != base, "other special ids"


def test_bos_and_eos_may_be_named_and_are_saved(tmp_path):
    model = tmp_path / "words.model"
    model.write_bytes(trained(200, bos_id=-1, control_symbols=["[CLS]"]))
    with pytest.raises(UserError, match="no token to begin a text with; name one of its pieces with --bos"):
        load_tokenizer(model)
    with pytest.raises(UserError, match=r"\[CLZ\] .* did you mean \[CLS\]"):
        load_tokenizer(model, bos="[CLZ]")
    tokenizer = load_tokenizer(model, bos="[CLS]")
    assert tokenizer.token(tokenizer.bos_id) == "[CLS]" and tokenizer.token(tokenizer.eos_id) == "</s>"
    tokenizer.save(tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint and again.bos_id == tokenizer.bos_id
        assert again.encode("the [CLS] whale") == tokenizer.encode("the [CLS] whale")
    assert load_tokenizer(tmp_path / "saved", bos="</s>").bos_id == tokenizer.eos_id
    assert load_tokenizer(None, eos="<s>").eos_id == EMBEDDED.bos_id


def test_a_mask_of_its_own_is_used():
    tokenizer = SentencePieceTokenizer(trained(200, control_symbols=["<mask>"]))
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (200, 3)
    assert tokenizer.decode([*tokenizer.encode("the"), 3]) == "the _"
    assert 3 not in tokenizer.encode("the <mask>")
    learned = SentencePieceTokenizer(trained(200, user_defined_symbols=["<mask>"]))
    assert learned.mask_id == 200 and 200 not in learned.encode("the <mask>"), "text writes that piece"


def test_a_folder_with_both_kinds_is_hugging_face(tmp_path):
    end = "<|endoftext|>"
    folder = json_folder(tmp_path / "both", byte_level(), bos_token=end, eos_token=end)
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    assert load_tokenizer(folder).kind == "huggingface"
    assert load_tokenizer(folder / "tokenizer.model").fingerprint == EMBEDDED.fingerprint


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"none\.model, which does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    assert not holds_tokenizer(tmp_path)
    bad = tmp_path / "tokenizer.model"
    for content in (b"no model", b""):
        bad.write_bytes(content)
        assert holds_tokenizer(tmp_path)
        for path in (bad, tmp_path):
            with pytest.raises(UserError, match=r"--tokenizer .*tokenizer\.model is no sentencepiece model"):
                load_tokenizer(path, setting="--tokenizer")
    bad.unlink()
    bad.mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        load_tokenizer(tmp_path)
