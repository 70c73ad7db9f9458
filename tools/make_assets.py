"""Makes the embedded corpus and its tokenizer from two JSON-lines files.

    python tools/make_assets.py --train books.train.jsonl --valid books.valid.jsonl [--out imdm_scale/assets]

Each line of the inputs is an object with "id", "source" and "text". The outputs are

    corpus.train.jsonl.xz, corpus.valid.jsonl.xz    the same documents in the same order, compressed
    tokenizer.model                                 a sentencepiece model, trained on the training part only

and depend on nothing but the inputs and the versions of sentencepiece and liblzma: the tool trains in one
thread and draws no random number, so two runs write the same bytes.

The tokenizer is a unigram model. Its normalisation leaves every character as it is, apart from white space:
runs of it become one space. It has no byte fallback, for 256 byte pieces would be a sixteenth of the
vocabulary that the corpus never uses; every character of the corpus and every printable ASCII character has
a piece instead, and others are read as <unk>.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import string
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from imdm_scale.assets import ASSETS
from imdm_scale.errors import UserError

VOCAB_SIZE = 4096
"""Number of pieces of the tokenizer; the mask token is not among them."""

WHITE_SPACE = (0x9, 0xA, 0xB, 0xC, 0xD, 0x85, 0xA0, 0x2028, 0x2029)
"""Code points that the tokenizer reads as a space."""


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


def train_tokenizer(records: list[dict[str, str]]) -> bytes:
    """A serialised sentencepiece unigram model, trained on the paragraphs of `records`."""

    def paragraphs() -> Iterator[str]:
        for record in records:
            yield from filter(None, map(str.strip, record["text"].split("\n")))

    model = io.BytesIO()
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "white_space.tsv"
        rules.write_text("".join(f"{code:X}\t20\n" for code in WHITE_SPACE), encoding="ascii")
        os.chdir(folder)  # the model records the rules' path as given: a bare name is the same in every run
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=paragraphs(),
            model_writer=model,
            model_type="unigram",
            vocab_size=VOCAB_SIZE,
            normalization_rule_tsv=rules.name,
            character_coverage=1.0,
            required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        os.chdir(start)
    return model.getvalue()


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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = {f"corpus.{split}.jsonl.xz": compress(records) for split, records in splits.items()}
    files["tokenizer.model"] = train_tokenizer(splits["train"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (arguments.out / name).write_bytes(content)
        print(f"{arguments.out / name}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
