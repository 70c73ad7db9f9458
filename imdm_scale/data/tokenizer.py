"""The tokenizer: a sentencepiece model, with the mask token appended to its pieces."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import sentencepiece

from imdm_scale.assets import TOKENIZER
from imdm_scale.errors import UserError

FILE_NAME = "tokenizer.model"


class Tokenizer:
    """Text to token ids and back."""

    vocab_size: int
    """Number of ids: the pieces and the mask token, which has the last id."""
    mask_id: int
    """Id of the mask token: the number of pieces."""
    bos_id: int
    """Id of <s>, with which every block begins."""
    eos_id: int
    """Id of </s>, with which every document and every block ends."""
    fingerprint: str
    """SHA-256 (hexadecimal) over the ordered pieces and the special ids: equal where ids mean the same."""

    def __init__(self, model: bytes) -> None:
        """A tokenizer from a serialised sentencepiece model.

        Raises:
            ValueError: the model has no <s> or no </s>.
        """
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = self._processor.vocab_size()
        self.vocab_size, self.mask_id = pieces + 1, pieces
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError("the sentencepiece model has no <s> or no </s>")
        digest = hashlib.sha256()
        for name in [self._processor.id_to_piece(i) for i in range(pieces)]:
            digest.update(name.encode("utf-8") + b"\0")
        special = (self._processor.unk_id(), self.bos_id, self.eos_id, self._processor.pad_id(), self.mask_id)
        digest.update(repr(special).encode())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def load(cls, path: Path | None) -> Tokenizer:
        """The tokenizer of a `.model` file or of a folder with a `tokenizer.model`; None: the embedded one.

        Raises:
            UserError: there is no such file, or it is no sentencepiece model with <s> and </s>.
        """
        file = TOKENIZER if path is None else path / FILE_NAME if path.is_dir() else path
        try:
            return cls(file.read_bytes())
        except OSError as error:
            raise UserError(
                f"tokenizer.path {file} cannot be read ({error.strerror}); give a sentencepiece .model file, "
                f"or a folder that has {FILE_NAME}."
            ) from None
        except (RuntimeError, ValueError):
            raise UserError(
                f"tokenizer.path {file} is no sentencepiece model with <s> and </s>; "
                "train one with bos_id and eos_id set, or leave tokenizer.path out for the embedded one."
            ) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without <s> and </s>."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: <s> and </s> are dropped, and each mask token stands as a word `_`."""
        kept = [int(i) for i in ids if int(i) not in (self.bos_id, self.eos_id)]
        words: list[str] = []
        for masked, group in groupby(kept, key=self.mask_id.__eq__):
            run = list(group)
            words += ["_"] * len(run) if masked else [self._processor.decode(run)]
        return " ".join(words)

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.model` into `directory`, whole or not at all."""
        temporary = directory / f".{FILE_NAME}.{os.getpid()}"
        temporary.write_bytes(self._model)
        os.replace(temporary, directory / FILE_NAME)
