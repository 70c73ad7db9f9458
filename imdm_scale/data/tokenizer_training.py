"""Training a sentencepiece model on a corpus.

Its normalisation leaves every character as it is, apart from white space: runs of it become one space. Every
printable ASCII character has a piece, so that no English text needs <unk>, and digits stand one by one.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import string
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from imdm_scale.data.tokenizer import well_formed
from imdm_scale.errors import UserError

WHITE_SPACE = (0x9, 0xA, 0xB, 0xC, 0xD, 0x85, 0xA0, 0x2028, 0x2029)
"""Code points that the tokenizer reads as a space."""

MAX_SENTENCE_BYTES = 1 << 20
"""What sentencepiece takes as one sentence; it drops longer ones."""
MAX_SENTENCE_CHARACTERS = 1 << 13
"""Longer paragraphs are cut: where they repeat themselves, its time grows with the square of their length."""

RARE_CHARACTERS = 0.0005
"""Share of a text's characters, the rarest ones, that have no piece of their own where bytes can stand for them."""


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: Literal["unigram", "bpe"] = "unigram",
    byte_fallback: bool = False,
    num_threads: int = 1,
    max_sentences: int | None = None,
) -> bytes:
    """A serialised sentencepiece model, trained on the paragraphs of documents.

    It depends on the arguments alone: the same texts give the same bytes.

    Args:
        texts: the documents, read once; a paragraph is a line.
        vocab_size: number of pieces, with <unk>, <s> (id 1) and </s> (id 2) but without the mask token.
        model_type: unigram (Kudo, arXiv 1804.10959) or bpe (Sennrich et al., arXiv 1508.07909).
        byte_fallback: give each byte a piece, 256 in all, so that every text has ids without <unk>. Otherwise every
            character of the corpus has a piece.
        num_threads: threads of sentencepiece; its sums of probabilities may differ by a rounding with their number,
            and so may the pieces.
        max_sentences: train on a random sample of so many paragraphs, for corpora larger than memory; None takes
            all. The sample is the same every time.

    Raises:
        UserError: there is no text, or it cannot have so many or so few pieces.
        Exception: what `texts` raises.
    """
    # Named only where it is set: the model records which settings were given.
    bytes_for_rare = {"byte_fallback": True, "character_coverage": 1 - RARE_CHARACTERS}
    coverage: dict[str, Any] = bytes_for_rare if byte_fallback else {"character_coverage": 1.0}
    failure: list[BaseException] = []
    start = Path.cwd()

    def sentences() -> Iterator[str]:
        paragraphs = _sample(_paragraphs(texts), max_sentences)
        while True:
            try:
                with contextlib.chdir(start):  # `texts` may open files by relative paths
                    paragraph = next(paragraphs, None)
            except BaseException as error:
                failure.append(error)
                raise
            if paragraph is None:
                return
            yield paragraph

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "white_space.tsv"
        rules.write_text("".join(f"{code:X}\t20\n" for code in WHITE_SPACE), encoding="ascii")
        try:
            # The model records the rules' path as given: a bare name is the same in every run.
            with contextlib.chdir(folder):
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=sentences(),
                    model_writer=model,
                    model_type=model_type,
                    vocab_size=vocab_size,
                    normalization_rule_tsv=rules.name,
                    required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
                    split_digits=True,
                    max_sentence_length=MAX_SENTENCE_BYTES,
                    unk_id=0,
                    bos_id=1,
                    eos_id=2,
                    pad_id=-1,
                    num_threads=num_threads,
                    minloglevel=2,
                    **coverage,
                )
        except RuntimeError as error:
            if failure:
                raise failure[0] from None
            raise UserError(_explanation(str(error), vocab_size)) from None
    return model.getvalue()


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    size = MAX_SENTENCE_CHARACTERS
    for text in texts:
        for paragraph in filter(None, map(str.strip, well_formed(text).split("\n"))):
            yield from (paragraph[i : i + size] for i in range(0, len(paragraph), size))


def _sample(sentences: Iterator[str], count: int | None) -> Iterator[str]:
    """A uniform sample of `count` sentences (Vitter's algorithm R); all of them if there are no more, or for None."""
    if count is None:
        yield from sentences
        return
    generator, kept = random.Random(0), []
    for number, sentence in enumerate(sentences):
        if number < count:
            kept.append(sentence)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = sentence
    yield from kept


def _explanation(message: str, vocab_size: int) -> str:
    """sentencepiece's message as a sentence."""
    if match := re.search(r"too high .*<= (\d+)", message):
        return (
            f"--vocab-size is {vocab_size}, but this text has no more than {match[1]} pieces; "
            f"set it to {match[1]} or less, or give more text."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size is {vocab_size}, but this text's characters alone need {match[1]} pieces; "
            f"set it above {match[1]}."
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "There is no text to train a tokenizer on; give a corpus with at least one word."
    return f"sentencepiece trains no tokenizer with --vocab-size {vocab_size}: {' '.join(message.split())}."
