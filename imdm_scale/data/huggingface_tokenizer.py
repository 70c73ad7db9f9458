"""Hugging Face's fast tokenizers as tokenizers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import tokenizers

from imdm_scale.data.special_tokens import CONFIG_FILE
from imdm_scale.data.tokenizer import Tokenizer, fingerprint

FILE_NAME = "tokenizer.json"
PARALLELISM = "TOKENIZERS_PARALLELISM"


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer, by the library that transformers' fast tokenizers are made of.

    Without transformers itself: nothing rebuilds the tokenizer after its class, nothing is added to the ids, no
    text is cut or complained of for its length, and a process that only tokenises starts quickly.
    """

    kind = "huggingface"

    def __init__(self, description: str, special_tokens: Mapping[str, str]) -> None:
        """A tokenizer from what its files say.

        Args:
            description: the text of a `tokenizer.json` that has all special tokens, the mask among them.
            special_tokens: kind -> token, as in `tokenizer_config.json`; bos_token, eos_token and mask_token are
                needed, others are saved again.
        """
        self._description, self._special_tokens = description, dict(special_tokens)
        self._backend = tokenizers.Tokenizer.from_str(description)
        self._backend.encode_special_tokens = True  # a document's "[MASK]" is read as its letters
        ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self._pieces = [""] * self.vocab_size
        for piece, token_id in ids.items():
            self._pieces[token_id] = piece
        self.bos_id, self.eos_id = ids[special_tokens["bos_token"]], ids[special_tokens["eos_token"]]
        self.mask_id = ids[special_tokens["mask_token"]]
        self.fingerprint = fingerprint(self._pieces, (self.bos_id, self.eos_id, self.mask_id))
        letters = self._encode_by_backend(list(special_tokens["mask_token"]))
        self._mask_as_text = [i for of_letter in letters for i in of_letter if i != self.mask_id]

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, Mapping[str, str]]]:
        return HuggingFaceTokenizer, (self._description, self._special_tokens)

    def token(self, token_id: int) -> str:
        return self._pieces[token_id]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [
            self._without_mask(ids) if self.mask_id in ids else ids for ids in self._encode_by_backend(texts)
        ]

    def _encode_by_backend(self, texts: list[str]) -> list[list[int]]:
        with _in_this_thread():
            return [
                encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
            ]

    def _without_mask(self, ids: list[int]) -> list[int]:
        """`ids` with each mask as the ids of its letters.

        Where the mask is also an ordinary piece, as in unigram vocabularies, its spelling in a document gives it.
        """
        return [
            i for token_id in ids for i in (self._mask_as_text if token_id == self.mask_id else [token_id])
        ]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _files(self) -> Mapping[str, bytes]:
        # Of this class transformers builds exactly what tokenizer.json describes.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_tokens,
        }
        return {
            CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(),
            FILE_NAME: self._description.encode(),
        }


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """Within it the backend divides no batch over threads of its own.

    A corpus is divided over processes, as many as the user asked for; threads in each of them would fight for the
    same cores, and a pool of threads does not survive a fork. The backend can be told by an environment variable
    only, read at every call. It is set back, since other code of this process may have its own wish.
    """
    before = os.environ.get(PARALLELISM)
    if before != "false":
        os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(PARALLELISM, None)
        elif before != "false":
            os.environ[PARALLELISM] = before
