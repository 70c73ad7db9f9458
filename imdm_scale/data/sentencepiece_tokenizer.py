"""Sentencepiece models as tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import sentencepiece

from imdm_scale.config.nearest import did_you_mean
from imdm_scale.data.special_tokens import CONFIG_FILE, special_tokens
from imdm_scale.data.tokenizer import MASK_TOKEN, Tokenizer, fingerprint
from imdm_scale.errors import UserError

FILE_NAME = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Its mask is its own control symbol [MASK] or <mask>, or else appended to the pieces."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, bos: str | None = None, eos: str | None = None) -> None:
        """A tokenizer from a serialised model.

        Args:
            bos, eos: pieces to use as BOS and EOS; None takes the model's own.

        Raises:
            RuntimeError: these are no bytes of a model.
            UserError: there is no such piece, or the model has no BOS or EOS of its own.
        """
        if not model:
            raise RuntimeError("an empty file is no model")
        self._model, self._bos, self._eos = model, bos, eos
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        num_pieces = self._processor.vocab_size()
        pieces = [self._processor.id_to_piece(i) for i in range(num_pieces)]
        self.bos_id = self._special(bos, self._processor.bos_id(), "begin", "--bos", pieces)
        self.eos_id = self._special(eos, self._processor.eos_id(), "end", "--eos", pieces)
        own = [
            i
            for i in map(self._processor.piece_to_id, (MASK_TOKEN, "<mask>"))
            if self._processor.is_control(i)
        ]
        self.mask_id = own[0] if own else num_pieces
        self.vocab_size = num_pieces + (not own)
        unk_id, pad_id = self._processor.unk_id(), self._processor.pad_id()
        self.fingerprint = fingerprint(pieces, (unk_id, self.bos_id, self.eos_id, pad_id, self.mask_id))

    @staticmethod
    def _special(name: str | None, own_id: int, verb: str, flag: str, pieces: list[str]) -> int:
        if name is None and own_id >= 0:
            return own_id
        if name is None:
            raise UserError(
                f"this sentencepiece model has no token to {verb} a text with; name one of its pieces with {flag}, "
                "or train a model with <s> and </s>."
            )
        if name not in pieces:
            nearby = did_you_mean(name, pieces, f"it has pieces such as {', '.join(pieces[:5])}.")
            raise UserError(
                f"{name} is named (by {flag}, or in {CONFIG_FILE}) as the token to {verb} a text with, but it is no "
                f"piece of this sentencepiece model; {nearby}"
            )
        return pieces.index(name)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str | None, str | None]]:
        return SentencePieceTokenizer, (self._model, self._bos, self._eos)

    def token(self, token_id: int) -> str:
        if token_id == self.mask_id:
            return MASK_TOKEN
        return self._processor.id_to_piece(token_id)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # One by one, for a list is handed to a thread even with num_threads=1, and is no faster.
        return [self._processor.encode(text) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _files(self) -> Mapping[str, bytes]:
        """The model, and what transformers needs to know of it, which without it would read the pieces wrongly."""
        tokens = {"bos_token": self.token(self.bos_id), "eos_token": self.token(self.eos_id)}
        config: dict[str, object] = {**tokens}
        if self._is_unigram():
            own_mask = self.mask_id < self._processor.vocab_size()
            config = {
                "tokenizer_class": "T5Tokenizer",
                "extra_ids": 0,
                **tokens,
                "unk_token": self.token(self._processor.unk_id()),
                "pad_token": tokens["eos_token"],  # or transformers would add one
                "mask_token": self._processor.id_to_piece(self.mask_id) if own_mask else MASK_TOKEN,
            }
        return {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), FILE_NAME: self._model}

    def _is_unigram(self) -> bool:
        """Whether the model is of the kind that T5's tokenizer computes; only that kind ranks segmentations."""
        try:
            self._processor.nbest_encode_as_ids("a", 1)
        except RuntimeError:
            return False
        return True


def load_sentencepiece(path: Path, setting: str, bos: str | None, eos: str | None) -> SentencePieceTokenizer:
    """The tokenizer of a `.model` file, or of a folder with one, where a JSON file beside it may name BOS and EOS.

    Raises:
        UserError: it cannot be read, is no sentencepiece model, or has no BOS or EOS.
    """
    is_folder = path.is_dir()
    file = path / FILE_NAME if is_folder else path
    try:
        named = special_tokens(path) if is_folder else {}
        model = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{setting} {file} cannot be read ({reason}); give a sentencepiece .model file, "
            f"or a folder that has {FILE_NAME}."
        ) from None
    try:
        return SentencePieceTokenizer(model, bos or named.get("bos_token"), eos or named.get("eos_token"))
    except UserError as error:
        raise UserError(f"{setting} {file}: {error}") from None
    except RuntimeError:
        raise UserError(
            f"{setting} {file} is no sentencepiece model; train one with tools/prepare_data.py train-tokenizer, or "
            "give the folder of a Hugging Face tokenizer, or leave it out for the packaged one."
        ) from None
