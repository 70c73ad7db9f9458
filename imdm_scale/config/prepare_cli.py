"""The arguments of tools/prepare_data.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from imdm_scale.config.arguments import Commands, Parser, whole

PROGRAM = "python tools/prepare_data.py"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")

PREPARE_EXAMPLES = """\
examples:
  # the books that ship with the package, with the tokenizer that ships with it
  python tools/prepare_data.py prepare --out data/books --length 64

  # OpenWebText from the Hugging Face hub, as in the literature: GPT-2's tokenizer, blocks of 1024 tokens
  python tools/prepare_data.py prepare --source Skylion007/openwebtext --tokenizer gpt2 --out data/openwebtext

  # your own text: one file or a folder of .parquet, .jsonl (also .gz, .zst) or .txt files, or save_to_disk's folder
  python tools/prepare_data.py prepare --source corpus.jsonl.zst --tokenizer path/to/gpt2 --out data/corpus

Interrupted, the same command goes on. The result depends on text, tokenizer and options alone, not on --workers."""

TRAIN_TOKENIZER_EXAMPLES = """\
example:
  python tools/prepare_data.py train-tokenizer --source corpus.jsonl --vocab-size 8192 --out corpus.model
  python tools/prepare_data.py prepare --source corpus.jsonl --tokenizer corpus.model --out data/corpus"""

VERIFY_EXAMPLES = """\
examples:
  python tools/prepare_data.py verify data/books
  python tools/prepare_data.py verify s3://bucket/openwebtext --threads 8 --samples 0

Shards of a URL pass through a temporary folder (under $TMPDIR), a few at a time.
The exit code is 0 if all is well, 1 if something is damaged, 2 if there is nothing to verify."""

STATS_EXAMPLES = """\
examples:
  python tools/prepare_data.py stats data/books --out books.png
  python tools/prepare_data.py stats s3://bucket/openwebtext --max-blocks 100000

Shards are read one after the other; those of a URL pass through a temporary folder (under $TMPDIR)."""


def parse_prepare_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`command` (prepare, train-tokenizer, verify or stats) and that command's own arguments.

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: no command, or a flag is missing, unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = Parser(prog=PROGRAM, description="Text to token shards for training, and a look at them.")
    commands = Commands(parser)
    _add_prepare(
        commands.add(
            "prepare",
            "[--source PATH_OR_HUB_NAME] [--tokenizer PATH_OR_NAME] --out DIR [...]",
            "text to a folder of token shards",
            PREPARE_EXAMPLES,
            long="Tokenises documents, packs them into blocks of equal length and writes these as shards with a "
            "manifest.",
        )
    )
    _add_train_tokenizer(
        commands.add(
            "train-tokenizer",
            "[--source PATH_OR_HUB_NAME] --vocab-size N --out FILE.model [...]",
            "train a sentencepiece tokenizer",
            TRAIN_TOKENIZER_EXAMPLES,
            long="Trains a sentencepiece tokenizer on the train split of any source.",
        )
    )
    _add_verify(
        commands.add(
            "verify",
            "DIR_OR_URL [...]",
            "is a prepared folder whole?",
            VERIFY_EXAMPLES,
            long="Reads every byte of a prepared folder: sizes, SHA-256 and counts against the manifest, ids against "
            "the tokenizer;\nshows which tokens there are and some blocks as text. Lists every damage, not only the "
            "first.",
        )
    )
    _add_stats(
        commands.add(
            "stats",
            "DIR_OR_URL [--out PLOT.png] [...]",
            "what is in a prepared folder?",
            STATS_EXAMPLES,
            long="Counts, entropies and token frequencies of a prepared folder, as a table and a plot.",
        )
    )
    return commands.parse(argv)


def _add_source(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text")
    text.add_argument(
        "--source",
        metavar="PATH_OR_HUB_NAME",
        help="a file or folder, or a dataset's name on the Hugging Face hub (default: the embedded books)",
    )
    text.add_argument("--name", metavar="CONFIG", help="the hub dataset's configuration")
    text.add_argument(
        "--text-column", default="text", metavar="C", help="field that holds the text (default: text)"
    )
    text.add_argument(
        "--text-unit",
        choices=("line", "paragraph", "document"),
        help="a document of a text file (default: paragraph for one file, document, the whole file, for a folder's)",
    )
    text.add_argument(
        "--streaming", action="store_true", help="read a hub dataset without storing it on this machine"
    )
    text.add_argument(
        "--detokenizer",
        metavar="NAME",
        help="undo a corpus' own tokenisation: wikitext, ptb, lm1b, lambada, scientific_papers",
    )
    text.add_argument(
        "--train", metavar="SPLIT", help="such as 'train[:-100000]', or none (default: the corpus' own rule)"
    )
    text.add_argument(
        "--valid", metavar="SPLIT", help="such as 'train[-100000:]', or none (default: the corpus' own rule)"
    )


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH_OR_NAME",
        help="sentencepiece .model, a folder of a Hugging Face tokenizer, or a name on the hub (default: the embedded)",
    )
    tokenizer.add_argument(
        "--bos", metavar="TOKEN", help="token that begins a block (default: the tokenizer's)"
    )
    tokenizer.add_argument(
        "--eos", metavar="TOKEN", help="token that ends documents and blocks (default: the tokenizer's)"
    )
    blocks = parser.add_argument_group("blocks")
    blocks.add_argument(
        "--length", type=whole(1), default=1024, metavar="N", help="tokens in a block (default: 1024)"
    )
    blocks.add_argument(
        "--packing",
        choices=("wrapped", "plain", "document"),
        default="wrapped",
        help="wrapped: BOS, length - 2 tokens of the documents' concatenation, EOS, as in the literature (default); "
        "plain: the concatenation, cut; document: one document a block, cut or filled up with EOS",
    )
    blocks.add_argument(
        "--documents-per-group",
        type=whole(0),
        default=1000,
        metavar="N",
        help="the rest of every so many documents is dropped, as in the literature; "
        "0: only the end of the corpus (default: 1000)",
    )
    blocks.add_argument(
        "--no-document-eos",
        dest="document_eos",
        action="store_false",
        help="no EOS after each document (wrapped, plain)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    output.add_argument(
        "--shard-mib", type=whole(1), default=64, metavar="N", help="size of a shard in MiB (default: 64)"
    )
    output.add_argument(
        "--shuffle-window",
        type=whole(1),
        default=8,
        metavar="N",
        help="shards whose blocks are shuffled together when they are read (default: 8)",
    )
    output.add_argument(
        "--workers", type=whole(1), metavar="N", help="processes that tokenise (default: one per core)"
    )


def _add_train_tokenizer(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--out", type=Path, required=True, metavar="FILE.model", help="file of the tokenizer"
    )
    tokenizer.add_argument(
        "--vocab-size", type=whole(1), required=True, metavar="N", help="pieces, without the mask token"
    )
    tokenizer.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="(default: unigram)"
    )
    tokenizer.add_argument(
        "--byte-fallback",
        action="store_true",
        help="256 pieces of one byte each, so that no character is unknown",
    )
    tokenizer.add_argument(
        "--max-documents",
        type=whole(1),
        metavar="N",
        help="train on the first N documents (default: on all)",
    )
    tokenizer.add_argument(
        "--max-sentences",
        type=whole(1),
        metavar="N",
        help="train on a random sample of N paragraphs, for text larger than memory (default: on all)",
    )
    tokenizer.add_argument(
        "--threads",
        type=whole(1),
        default=4,
        metavar="N",
        help="threads of the training; another number may give slightly other pieces (default: 4)",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument(
        "--samples", type=whole(0), default=3, metavar="N", help="blocks shown as text (default: 3)"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="draws the samples (default: 0)"
    )
    parser.add_argument(
        "--threads", type=whole(1), default=4, metavar="N", help="shards read at once (default: 4)"
    )


def _add_stats(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument(
        "--out", type=_plot_file, metavar="PLOT.png", help=f"also draw a plot ({', '.join(PLOT_SUFFIXES)})"
    )
    parser.add_argument(
        "--max-blocks",
        type=whole(1),
        metavar="N",
        help="read no more than about N blocks of a split, evenly spaced (default: all)",
    )


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR_OR_URL", help="a prepared folder")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plot_file(text: str) -> Path:
    if not text.endswith(PLOT_SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PLOT_SUFFIXES)}")
    return Path(text)
