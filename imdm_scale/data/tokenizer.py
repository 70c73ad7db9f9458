"""Text to token ids and back, whatever the kind of tokenizer."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from imdm_scale.assets import TOKENIZER
from imdm_scale.config.nearest import near_files
from imdm_scale.errors import UserError

MASK_TOKEN = "[MASK]"
"""Name of the mask token that is appended to a vocabulary without one."""


class Tokenizer(ABC):
    """Text to token ids and back. Can be pickled, for the processes that tokenise a corpus.

    Text is only text: no spelling of a special token in a document gives its id, least of all the mask's.
    """

    kind: str
    """Which library splits the text: "sentencepiece" or "huggingface"."""
    vocab_size: int
    """Number of ids, the mask's among them: the largest id plus 1, even where some have no piece."""
    mask_id: int
    """Id of the mask token: the vocabulary's own where it has one, else a new last one."""
    bos_id: int
    """Id with which every block begins."""
    eos_id: int
    """Id with which every document and every block ends; some vocabularies have one token for both."""
    fingerprint: str
    """SHA-256 (hexadecimal) over the ordered pieces and the special ids: equal where ids mean the same."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS and EOS; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS, of any length, computed in this thread alone.

        Lone surrogates are read as U+FFFD.
        """
        return self._encode([well_formed(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: BOS and EOS are dropped, and each mask token stands as a word `_`."""
        kept = [int(i) for i in ids if int(i) not in (self.bos_id, self.eos_id)]
        words: list[str] = []
        for masked, group in groupby(kept, key=self.mask_id.__eq__):
            run = list(group)
            words += ["_"] * len(run) if masked else [self._decode(run)]
        return words[0] if len(words) == 1 else " ".join(word.strip(" ") for word in words)

    @abstractmethod
    def token(self, token_id: int) -> str:
        """The piece of an id as the vocabulary spells it; empty where an id has none.

        Raises:
            IndexError: there is no such id.
        """

    def save(self, directory: Path) -> None:
        """Writes the files from which `load_tokenizer(directory)` gives the same tokenizer, each file whole.

        The same bytes every time. The folder is made if need be, and should hold no other tokenizer.

        Raises:
            UserError: the disk refuses; no file has changed.
        """
        files = self._files()
        temporary = {name: directory / f".{name}.{os.getpid()}" for name in files}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                temporary[name].write_bytes(content)
            for name in files:
                os.replace(temporary[name], directory / name)
        except OSError as error:
            raise UserError(
                f"The tokenizer cannot be written to {directory} ({error.strerror}); "
                "free space, or choose another folder."
            ) from None
        finally:
            for file in temporary.values():
                if file.exists():
                    file.unlink()

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """`encode_batch` of texts that UTF-8 can hold."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids without BOS, EOS and mask."""

    @abstractmethod
    def _files(self) -> Mapping[str, bytes]:
        """Name -> content of the files to save; the one that makes a folder a tokenizer's comes last."""


def load_tokenizer(
    path: str | Path | None,
    *,
    setting: str = "tokenizer.path",
    bos: str | None = None,
    eos: str | None = None,
    allow_hub: bool = False,
) -> Tokenizer:
    """The tokenizer at a path.

    Args:
        path: a sentencepiece `.model` file; a folder with `tokenizer.json`, with `vocab.json` and `merges.txt`
            (GPT-2), with `vocab.txt` (BERT) or with `tokenizer.model`, the first of these that it has; None
            takes the packaged one.
        setting: what the path was given as, for messages.
        bos, eos: tokens to use as BOS and EOS; None takes the tokenizer's own, or the tokens with which BERT
            begins and ends a text.
        allow_hub: a path that does not exist may be a name on the Hugging Face hub.

    Raises:
        UserError: there is no tokenizer, it is damaged or of a kind that cannot be read, or it has no BOS or EOS.
    """
    # Here, since both modules import this one, and so that no program loads a library that it does not need.
    from imdm_scale.data.huggingface_files import download, holds_huggingface, load_huggingface
    from imdm_scale.data.sentencepiece_tokenizer import FILE_NAME, load_sentencepiece

    if path is None:
        return load_sentencepiece(TOKENIZER, setting, bos, eos)
    place = Path(path)
    if not place.exists():
        if not allow_hub:
            raise UserError(f"{setting} is {path}, which does not exist; {near_files(place)}")
        place = download(str(path), setting)
    if holds_huggingface(place):
        return load_huggingface(place, setting, bos, eos)
    if not place.is_dir() or (place / FILE_NAME).exists():
        return load_sentencepiece(place, setting, bos, eos)
    slow = (
        " Its tokenizer has no fast form there; write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        if (place / "tokenizer_config.json").exists()
        else ""
    )
    raise UserError(
        f"{setting} is {path}, a folder that holds no tokenizer; give a sentencepiece .model file, or a folder with "
        f"tokenizer.json, vocab.json and merges.txt, vocab.txt, or {FILE_NAME}.{slow}"
    )


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has files that `load_tokenizer` reads."""
    from imdm_scale.data.huggingface_files import holds_huggingface
    from imdm_scale.data.sentencepiece_tokenizer import FILE_NAME

    return holds_huggingface(folder) or (folder / FILE_NAME).exists()


def fingerprint(pieces: Iterable[str], special_ids: tuple[int, ...]) -> str:
    """SHA-256 (hexadecimal) over the pieces in the order of their ids, and the special ids."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode("utf-8") + b"\0")
    digest.update(repr(special_ids).encode())
    return digest.hexdigest()


def well_formed(text: str) -> str:
    """`text` with each lone surrogate, which JSON can hold but UTF-8 cannot, as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text
