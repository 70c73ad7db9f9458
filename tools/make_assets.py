"""Makes the embedded corpus and its tokenizer from two JSON-lines files.

    python tools/make_assets.py --train books.train.jsonl --valid books.valid.jsonl [--out imdm_scale/assets]

Each line of the inputs is an object with "id", "source" and "text". The outputs are

    corpus.train.jsonl.xz, corpus.valid.jsonl.xz    the same documents in the same order, compressed
    tokenizer.model                                 a sentencepiece model, trained on the training part only

and depend on nothing but the inputs and the versions of sentencepiece and liblzma: the tool trains in one
thread and draws no random number, so two runs write the same bytes.

The tokenizer is a unigram model as `train_sentencepiece` makes it. It has no byte fallback, for 256 byte pieces
would be a sixteenth of the vocabulary that the corpus never uses; every character of the corpus and every
printable ASCII character has a piece instead, and others are read as <unk>.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path

from imdm_scale.assets import ASSETS
from imdm_scale.data.tokenizer_training import train_sentencepiece
from imdm_scale.errors import UserError

VOCAB_SIZE = 4096
"""Number of pieces of the tokenizer; the mask token is not among them."""


def read_records(path: Path) -> list[dict[str, str]]:
    """The documents of the JSON-lines file `path`, reduced to their id, source and text.

    Raises:
        UserError: the file cannot be read, or a line is no object with these three fields.
    """
    records: list[dict[str, str]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                records.append({field: record[field] for field in ("id", "source", "text")})
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the path of a .jsonl file."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{path}, line {len(records) + 1} is not of the form {{"id": ..., "source": ..., "text": ...}}.'
        ) from None
    return records


def compress(records: list[dict[str, str]]) -> bytes:
    """The documents as xz-compressed JSON lines."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return lzma.compress(lines.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)


def main() -> int:
    """Writes the three files; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="documents to train on")
    parser.add_argument("--valid", type=Path, required=True, help="held-out documents")
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder to write to (default: the package's)"
    )
    arguments = parser.parse_args()
    try:
        splits = {"train": read_records(arguments.train), "valid": read_records(arguments.valid)}
        files = {f"corpus.{split}.jsonl.xz": compress(records) for split, records in splits.items()}
        texts = [record["text"] for record in splits["train"]]
        files["tokenizer.model"] = train_sentencepiece(texts, VOCAB_SIZE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (arguments.out / name).write_bytes(content)
        print(f"{arguments.out / name}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
