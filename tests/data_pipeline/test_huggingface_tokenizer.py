"""Hugging Face tokenizers: which files make which ids, what text can not write, and what comes back after saving."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast

from imdm_scale.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from tests.small_tokenizers import (
    BERT_TOKENS,
    END,
    bert_folder,
    byte_level,
    gpt2_folder,
    json_folder,
    texts,
    wordpiece,
)

GPT2 = {"bos_token": END, "eos_token": END}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    own_mask = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "mask_token": "<m>"}
    return {
        "gpt2": gpt2_folder(root / "gpt2"),
        "gpt2 json": json_folder(root / "gpt2_json", byte_level(), **GPT2),
        "own mask": json_folder(root / "own_mask", byte_level(("<s>", "</s>", "<m>")), **own_mask),
        "bert": bert_folder(root / "bert"),
        "cased bert": bert_folder(root / "cased_bert", lowercase=False),
    }


@pytest.fixture(scope="module")
def gpt2(folders) -> Tokenizer:
    return load_tokenizer(folders["gpt2"])


def special_ids(tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    return tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id


def test_special_ids(folders):
    found = {name: special_ids(load_tokenizer(folder)) for name, folder in folders.items()}
    assert found == {
        "gpt2": (501, 499, 499, 500),
        "gpt2 json": (501, 499, 499, 500),
        "own mask": (500, 497, 498, 499),
        "bert": (600, 2, 3, 4),
        "cased bert": (600, 2, 3, 4),
    }


@pytest.mark.parametrize(("name", "fast"), [("gpt2", GPT2TokenizerFast), ("bert", BertTokenizerFast)])
def test_a_bare_vocabulary_is_the_tokenizer_that_transformers_makes_of_it(folders, name, fast):
    ours, theirs = load_tokenizer(folders[name]), fast.from_pretrained(folders[name])
    assert ours.kind == "huggingface"
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts()]
    assert ours.encode_batch(texts()) == [ours.encode(text) for text in texts()] == expected
    assert [ours.token(i) for i in expected[0][:50]] == theirs.convert_ids_to_tokens(expected[0][:50])


def test_the_ids_are_those_of_tokenizer_json_whatever_else_the_folder_says(tmp_path):
    backend = wordpiece(lowercase=False)
    backend.enable_truncation(4)
    backend.enable_padding(length=1000)
    folder = json_folder(tmp_path / "a", backend, tokenizer_class="BertTokenizer", **bert_names())
    gpt2_folder(tmp_path / "b").joinpath("vocab.json").rename(folder / "vocab.json")
    backend.no_truncation()
    backend.no_padding()
    expected = backend.encode(texts()[0], add_special_tokens=False).ids
    assert 4 < len(expected) < 1000
    assert load_tokenizer(folder).encode(texts()[0]) == expected


def bert_names() -> dict[str, str]:
    return dict(
        zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], BERT_TOKENS, strict=True)
    )


def test_dropout_of_merges_is_switched_off(tmp_path, gpt2):
    description = json.loads(byte_level().to_str())
    description["model"]["dropout"] = 0.5
    folder = json_folder(tmp_path / "a", tokenizers.Tokenizer.from_str(json.dumps(description)), **GPT2)
    assert load_tokenizer(folder).encode_batch(texts()) == gpt2.encode_batch(texts())


def test_a_bare_word_vocabulary_is_lower_cased_if_it_has_no_capitals(folders, tmp_path):
    lower, cased = load_tokenizer(folders["bert"]), load_tokenizer(folders["cased bert"])
    assert lower.encode("The The") == lower.encode("the the")
    assert cased.encode("The") != cased.encode("the")
    told = bert_folder(tmp_path / "told", lowercase=False)
    (told / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert load_tokenizer(told).encode("The") == load_tokenizer(told).encode("the")


def test_names_come_from_either_file_or_from_the_class_of_the_model(tmp_path):
    folder = json_folder(tmp_path / "map", byte_level())
    (folder / "special_tokens_map.json").write_text(json.dumps(GPT2))
    assert load_tokenizer(folder).bos_id == 499
    folder = json_folder(tmp_path / "hub", wordpiece(), model_max_length=512)
    with pytest.raises(UserError, match="--bos"):
        load_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 600}')
    assert special_ids(load_tokenizer(folder)) == (600, 2, 3, 4)


def test_a_mask_that_is_there_but_not_named_is_found(tmp_path):
    """As in LLaDA's tokenizer, which has tokens after its mask."""
    backend = byte_level()
    backend.add_special_tokens(["<|mdm_mask|>", "<|start_header_id|>"])
    size = backend.get_vocab_size()
    tokenizer = load_tokenizer(json_folder(tmp_path / "llada", backend, **GPT2))
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (size, size - 2)
    assert tokenizer.mask_id not in tokenizer.encode("a <|mdm_mask|> b")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_bos_and_eos_may_be_named(folders, tmp_path):
    literature = load_tokenizer(folders["bert"], eos="[CLS]")
    assert (literature.bos_id, literature.eos_id) == (2, 2)
    assert literature.fingerprint != load_tokenizer(folders["bert"]).fingerprint
    literature.save(tmp_path / "saved")
    assert special_ids(load_tokenizer(tmp_path / "saved")) == (600, 2, 2, 4)
    assert load_tokenizer(folders["bert"], bos="[PAD]").bos_id == 0
    with pytest.raises(UserError, match=r"--eos is \[CLZ\], .* did you mean .*\[CLS\]"):
        load_tokenizer(folders["bert"], eos="[CLZ]")


def test_without_bos_or_eos_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="--bos"):
        load_tokenizer(json_folder(tmp_path / "none", byte_level()))
    with pytest.raises(UserError, match="--eos"):
        load_tokenizer(json_folder(tmp_path / "bos", byte_level(), bos_token=END))
    absent = json_folder(tmp_path / "absent", byte_level(()), **GPT2)
    with pytest.raises(UserError, match="--bos"):
        load_tokenizer(absent)
    assert load_tokenizer(absent, bos="a", eos="b").vocab_size == 501


@pytest.mark.parametrize("name", ["gpt2", "own mask", "bert", "cased bert"])
@given(data=st.data())
def test_text_writes_no_special_token(folders, name, data):
    tokenizer = load_tokenizer(folders[name])
    spellings = [*BERT_TOKENS, END, "<s>", "</s>", "<m>", "<mask>", "[mask]", " "]
    text = data.draw(st.lists(st.sampled_from(spellings) | st.text(max_size=3)).map("".join))
    (batched,) = tokenizer.encode_batch([text])
    assert batched == tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id} & set(batched)


def test_a_mask_that_is_an_ordinary_piece_is_not_written_either(tmp_path):
    pieces = [("<unk>", 0.0), ("<mask>", 0.0), *((letter, -3.0) for letter in "<mask>b")]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[MASK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = byte_level()
    plain.add_tokens([AddedToken("[MASK]", special=False)])
    for name, backend, text in (
        ("unigram", unigram, "a<mask>b"),
        ("words", words, "a [MASK] a"),
        ("plain", plain, "a[MASK]b"),
    ):
        bos = backend.id_to_token(0)
        tokenizer = load_tokenizer(json_folder(tmp_path / name, backend), bos=bos, eos=bos)
        assert backend.token_to_id(tokenizer.token(tokenizer.mask_id)) == tokenizer.mask_id
        assert tokenizer.mask_id in backend.encode(text).ids, "the backend itself would write it"
        ids = tokenizer.encode(text)
        assert tokenizer.mask_id not in ids and len(ids) > 2


def test_ids_without_a_piece_count_and_are_not_used_for_the_mask(tmp_path):
    vocabulary = {"a": 0, "b": 2, "c": 3, "d": 9}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer = load_tokenizer(json_folder(tmp_path / "a", backend), bos="c", eos="d")
    assert special_ids(tokenizer) == (11, 3, 9, 10)
    assert [tokenizer.token(i) for i in range(11)] == ["a", "", "b", "c", "", "", "", "", "", "d", "[MASK]"]
    tokenizer.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").fingerprint == tokenizer.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "b").mask_token_id == 10
    with pytest.raises(IndexError):
        tokenizer.token(11)


def test_decoding(folders, gpt2):
    for text in (*texts(), " two  spaces\n\n and , a . comma \n"):
        assert gpt2.decode(gpt2.encode(text)) == text
    the, whale, mask = gpt2.encode("the"), gpt2.encode(" whale"), gpt2.mask_id
    assert gpt2.decode([gpt2.bos_id, *the, mask, mask, *whale, mask, gpt2.eos_id]) == "the _ _ whale _"
    assert gpt2.decode([gpt2.bos_id, *whale, gpt2.eos_id]) == " whale"
    assert gpt2.decode([mask]) == "_" and gpt2.decode([]) == ""
    bert = load_tokenizer(folders["bert"])
    ids = [bert.bos_id, *bert.encode("The whale, he"), bert.mask_id, *bert.encode("said"), bert.eos_id]
    assert bert.decode(ids) == "the whale, he _ said"


def test_lone_surrogates_are_replaced(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud83db")) == "a\ufffdb"
    assert gpt2.encode_batch(["a\ud83db", "c"]) == [gpt2.encode("a\ufffdb"), gpt2.encode("c")]


@pytest.mark.parametrize("name", ["gpt2", "gpt2 json", "own mask", "bert", "cased bert"])
def test_what_is_saved_comes_back(folders, name, tmp_path):
    tokenizer = load_tokenizer(folders[name])
    tokenizer.save(tmp_path / "deep" / "1")
    again = load_tokenizer(tmp_path / "deep" / "1")
    again.save(tmp_path / "2")
    pickled = pickle.loads(pickle.dumps(tokenizer))
    for other in (again, pickled):
        assert other.fingerprint == tokenizer.fingerprint
        assert special_ids(other) == special_ids(tokenizer)
        assert other.encode_batch([*texts(), "[MASK]"]) == tokenizer.encode_batch([*texts(), "[MASK]"])
    files = {file.name: file.read_bytes() for file in (tmp_path / "deep" / "1").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "2").iterdir()}
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "2")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (theirs.mask_token_id, len(theirs)) == (tokenizer.mask_id, tokenizer.vocab_size)
    assert theirs(texts()[0], add_special_tokens=False)["input_ids"] == tokenizer.encode(texts()[0])


def test_fingerprints_follow_the_ids(folders, gpt2):
    found = {name: load_tokenizer(folder).fingerprint for name, folder in folders.items()}
    assert found["gpt2"] == found["gpt2 json"] == gpt2.fingerprint
    assert len(set(found.values())) == 4
    assert load_tokenizer(folders["gpt2"], eos="a").fingerprint != found["gpt2"]


def test_a_full_disk_leaves_what_was_saved(gpt2, tmp_path, monkeypatch):
    gpt2.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def refuse(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match="No space left"):
        gpt2.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


ALONE = """
import os, sys
from imdm_scale.data.tokenizer import load_tokenizer
before = os.environ.get("TOKENIZERS_PARALLELISM")
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.encode_batch(["the whale " * 100] * 64)
assert os.environ.get("TOKENIZERS_PARALLELISM") == before, "the user's own wish is kept"
assert "transformers" not in sys.modules, "starts slowly"
print(len(os.listdir("/proc/self/task")))
tokenizer._backend.encode_batch_fast(["the whale " * 100] * 64)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize("wish", [None, "true"])
def test_a_batch_is_encoded_by_one_thread(folders, wish):
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment |= {"RAYON_NUM_THREADS": "3"} | ({} if wish is None else {"TOKENIZERS_PARALLELISM": wish})
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folders["gpt2"]],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = map(int, done.stdout.split())
    assert theirs > ours, "without our doing the backend would start threads"
    assert done.stderr == ""


def test_long_texts_are_neither_cut_nor_complained_of(tmp_path, recwarn, caplog, capfd):
    folder = json_folder(tmp_path / "a", byte_level(), model_max_length=8, **GPT2)
    text = " ".join(texts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_folders_that_are_no_tokenizer(folders, tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as raised:
            load_tokenizer(folder, setting="--tokenizer")
        message = str(raised.value)
        assert "--tokenizer" in message and str(folder) in message and "\n" not in message
        return message

    assert "does not exist" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no tokenizer" in refused(empty) and not holds_tokenizer(empty)
    (empty / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMTokenizer"}')
    assert "no fast form" in refused(empty)
    (empty / "vocab.json").write_text("{}")
    assert "no fast form" in refused(empty)
    (empty / "merges.txt").write_text("#version: 0.2\n")
    assert "XLMTokenizer" in refused(empty)
    (empty / "tokenizer_config.json").write_text("{}")
    assert "0 pieces" in refused(empty)

    broken = gpt2_folder(tmp_path / "broken")
    merges = (broken / "merges.txt").read_text()
    (broken / "merges.txt").write_text("".join(merges.splitlines(keepends=True)[:100]))
    assert "merges.txt makes no" in refused(broken)
    (broken / "merges.txt").write_text(merges + "nowhere to be found\n")
    assert holds_tokenizer(broken) and "no tokenizer that can be read" in refused(broken)
    (broken / "vocab.json").write_text('{"a": 0')
    assert "no tokenizer that can be read" in refused(broken)
    (broken / "tokenizer.json").write_text("{}")
    assert "no tokenizer that can be read" in refused(broken)

    hollow = json_folder(tmp_path / "hollow", tokenizers.Tokenizer(models.BPE()), **GPT2)
    assert "0 pieces" in refused(hollow)
    (hollow / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json is no JSON object" in refused(hollow)

    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("the\nwhale\n")
    assert "no [UNK]" in refused(words)
    (words / "config.json").write_text('{"model_type": "clip"}')
    assert "CLIPTokenizer" in refused(words)


def test_a_slow_sentencepiece_or_word_tokenizer_does_not_pass_for_a_fast_one(folders, tmp_path):
    folder = gpt2_folder(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer", **GPT2}))
    with pytest.raises(UserError, match="CTRLTokenizer"):
        load_tokenizer(folder)
