"""What a folder of prepared data says of itself: `manifest.json`.

    FOLDER/manifest.json            written last: a folder without it is not finished
    FOLDER/tokenizer/               the tokenizer whose ids the shards hold
    FOLDER/train/00000.npy ...      token blocks (number of blocks, length), NumPy's own format
    FOLDER/valid/00000.npy ...

A manifest depends on the text, its name, the tokenizer and the options alone: not on when, where, or by how many
processes it was made. Its hash, which leaves the text's name out, therefore names the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imdm_scale.data.pairs import PACKING, row_width
from imdm_scale.errors import UserError

if TYPE_CHECKING:
    from imdm_scale.data.tokenizer import Tokenizer

FORMAT = 1
"""Version of the folder's layout; raised whenever the same input would give other blocks."""
FILE_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
DTYPES = ("uint16", "uint32")
"""Allowed types of the stored ids, narrowest first."""


@dataclass(frozen=True)
class Shard:
    """One file of token blocks."""

    file: str
    """Path relative to the folder, with forward slashes."""
    num_blocks: int
    """Rows of the array."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file's bytes, hexadecimal."""


@dataclass(frozen=True)
class Split:
    """One split of a corpus."""

    num_documents: int
    """Documents that were tokenised; blank ones do not count."""
    num_tokens: int
    """Token ids of these documents, with the EOS that ends each but without those that packing adds."""
    num_dropped: int
    """Of these, the ids that no block holds: rests of groups, ends of cut documents."""
    shards: tuple[Shard, ...]
    """In order: the blocks of the split are the concatenation of their rows."""

    @property
    def num_blocks(self) -> int:
        """Rows of all shards."""
        return sum(shard.num_blocks for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(frozen=True)
class TokenizerRecord:
    """What the ids mean."""

    fingerprint: str
    """See `Tokenizer.fingerprint`."""
    vocab_size: int
    """Number of ids, the mask's among them."""
    bos_id: int
    eos_id: int
    mask_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerRecord:
        """What a tokenizer's ids mean."""
        return cls(
            tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id
        )


@dataclass(frozen=True)
class Manifest:
    """The whole manifest."""

    format: int
    """`FORMAT` of the program that wrote it."""
    length: int
    """Tokens in a block."""
    dtype: str
    """Type of the stored ids, one of `DTYPES`."""
    shuffle_window: int
    """Shards whose blocks are shuffled together when the data are streamed: part of the order."""
    tokenizer: TokenizerRecord
    """What the ids mean."""
    source: dict[str, Any]
    """Where the text came from, as it was asked for."""
    options: dict[str, Any]
    """How it was packed; of pairs, how they were drawn."""
    splits: dict[str, Split]
    """By name: train, valid; one of them may be absent."""

    @property
    def holds_pairs(self) -> bool:
        """Whether a row is a pair of a state and a text (`imdm_scale.data.pairs`), not one block of text."""
        return self.options.get("packing") == PACKING

    @property
    def is_framed(self) -> bool:
        """Whether every block begins with BOS."""
        return self.options["framed"] if self.holds_pairs else self.options["packing"] != "plain"

    @property
    def row_width(self) -> int:
        """Integers in a row."""
        return row_width(self.length) if self.holds_pairs else self.length

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) over all but the source's name: equal where blocks and order are equal."""
        content = dataclasses.asdict(self)
        del content["source"]  # the same text may lie elsewhere
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """The manifest in `text`.

        Args:
            where: the folder, for messages.

        Raises:
            UserError: it is no manifest, or one of another format.
        """
        again = "prepare the data again with tools/prepare_data.py, or copy the folder again."
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise UserError(
                    f"{where}/{FILE_NAME} has format {content['format']}, but this version reads {FORMAT}; "
                    "prepare the data again with tools/prepare_data.py, or install the version that made them."
                )
            splits = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in content.pop("splits").items()
            }
            manifest = cls(
                **{**content, "tokenizer": TokenizerRecord(**content["tokenizer"]), "splits": splits}
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{where}/{FILE_NAME} is no manifest of prepared data ({reason}); {again}"
            ) from None
        if manifest.dtype not in DTYPES or any(split.num_blocks == 0 for split in manifest.splits.values()):
            raise UserError(f"{where}/{FILE_NAME} names no usable blocks; {again}")
        return manifest
