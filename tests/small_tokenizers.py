"""Small Hugging Face tokenizers, trained on the embedded corpus."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from imdm_scale.data.sources import SourceSpec, open_documents

END = "<|endoftext|>"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@cache
def embedded_texts(split: Literal["train", "valid"], count: int) -> list[str]:
    """The first documents of the embedded corpus."""
    documents = open_documents(SourceSpec(), split)
    assert documents is not None
    return next(iter(documents.batches(0, count)))


def texts() -> list[str]:
    """The documents on which the tokenizers are trained."""
    return embedded_texts("valid", 8)


def byte_level(special: tuple[str, ...] = (END,), vocab_size: int = 500) -> tokenizers.Tokenizer:
    """A byte-level BPE as GPT-2's; its special tokens have the last ids, as GPT-2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    backend.add_special_tokens(list(special))
    return backend


def wordpiece(lowercase: bool = True, vocab_size: int = 600) -> tokenizers.Tokenizer:
    """A WordPiece vocabulary as BERT's, with [MASK] before ordinary pieces, id 4."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT_TOKENS), show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    return backend


def gpt2_folder(folder: Path) -> Path:
    """Like GPT-2's: vocab.json and merges.txt and nothing else."""
    folder.mkdir(parents=True)
    description = json.loads(byte_level().to_str())
    vocabulary = description["model"]["vocab"] | {END: len(description["model"]["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{first} {second}\n" for first, second in description["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    return folder


def bert_folder(folder: Path, lowercase: bool = True) -> Path:
    """Like BERT's first ones: vocab.txt and nothing else."""
    folder.mkdir(parents=True)
    wordpiece(lowercase).model.save(str(folder))
    return folder


def json_folder(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    """tokenizer.json, and tokenizer_config.json with the given fields if there are any."""
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
