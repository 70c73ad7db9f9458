"""Text to token shards for training, and a look at them.

    python tools/prepare_data.py prepare --source PATH_OR_HUB_NAME --out DIR ...
    python tools/prepare_data.py train-tokenizer --source PATH_OR_HUB_NAME --vocab-size N --out FILE.model ...
    python tools/prepare_data.py verify DIR_OR_URL
    python tools/prepare_data.py stats DIR_OR_URL --out PLOT.png

Each command explains itself with --help; docs/data.md has more.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from imdm_scale.config.prepare_cli import available_cores, parse_prepare_arguments
from imdm_scale.data.prepare_console import PreparationReport, reading, say, show_next
from imdm_scale.errors import UserError

# What reads text and shards takes seconds to load, so each command loads it when its arguments are known to be right.
if TYPE_CHECKING:
    from imdm_scale.data.folder import PreparedFolder
    from imdm_scale.data.manifest import Manifest
    from imdm_scale.data.sources import SourceSpec

SHOWN_DOCUMENTS = 1000
"""On so many a new tokenizer's rate is measured."""


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 1 for damaged data, 2 for a mistake of the user's, 130 after Ctrl-C."""
    try:
        arguments = parse_prepare_arguments(argv)
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if argv[0] == "prepare" else ""
        print(f"interrupted{goes_on}.", file=sys.stderr)
        return 130


def prepare(arguments: argparse.Namespace) -> int:
    """Text to a folder of shards."""
    from imdm_scale.data.inspection_tables import contents_table
    from imdm_scale.data.prepare import PrepareOptions
    from imdm_scale.data.prepare import prepare as prepare_folder
    from imdm_scale.data.tokenizer import load_tokenizer

    console = Console()
    options = PrepareOptions(
        length=arguments.length,
        packing=arguments.packing,
        documents_per_group=arguments.documents_per_group,
        document_eos=arguments.document_eos,
        shard_bytes=arguments.shard_mib * 2**20,
        shuffle_window=arguments.shuffle_window,
    )
    tokenizer = load_tokenizer(
        arguments.tokenizer, setting="--tokenizer", bos=arguments.bos, eos=arguments.eos, allow_hub=True
    )
    out: Path = arguments.out
    with PreparationReport(console) as progress:
        manifest = prepare_folder(
            source_spec(arguments),
            tokenizer,
            options,
            out,
            workers=arguments.workers or available_cores(),
            report=progress.show,
        )
    if not progress.rates:
        say(console, f"{out} holds exactly this already; nothing was done.")
    say(console, headline(str(out), manifest), style="bold")
    console.print(contents_table(manifest, progress.rates or None))
    if {"train", "valid"} <= manifest.splits.keys():
        following = (
            "deepspeed tools/train.py --ds_config configs/ds/zero3.json --recipe configs/recipes/pretrain_tiny.yaml "
            f"{shlex.quote(f'data.path={out}')} model.length={manifest.length}"
        )
    else:
        following = f"python tools/prepare_data.py stats {shlex.quote(str(out))}"
    show_next(console, following)
    return 0


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """A sentencepiece model from the training text of any source."""
    from imdm_scale.data.durable import partial_path, put_in_place
    from imdm_scale.data.sources import open_documents
    from imdm_scale.data.tokenizer import load_tokenizer
    from imdm_scale.data.tokenizer_training import train_sentencepiece

    out: Path = arguments.out
    if out.is_dir():
        raise UserError(
            f"--out is {out}, which is a folder; name the tokenizer's file, such as {out / 'my.model'}."
        )
    documents = open_documents(source_spec(arguments), "train")
    if documents is None:
        raise UserError(
            "--train is none, but a tokenizer is trained on the training text; name a split, or leave it out."
        )
    console = Console()
    with writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    shown: list[str] = []  # the first documents, to say how well the tokenizer does on them
    status = console.status("reading documents")
    interrupt = signal.getsignal(signal.SIGINT)

    def texts() -> Iterator[str]:
        number = 0
        for batch in documents.batches(0, 100):
            for text in itertools.islice(batch, (arguments.max_documents or sys.maxsize) - number):
                number += 1
                if len(shown) < SHOWN_DOCUMENTS:
                    shown.append(text)
                yield text
            status.update(f"reading documents: {number:,}")
            if number == arguments.max_documents:
                break
        status.stop()
        say(console, f"training on {number:,} documents; this may take a while")
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # sentencepiece does not look for interrupts while it trains

    try:
        with status:
            model = train_sentencepiece(
                texts(),
                arguments.vocab_size,
                model_type=arguments.model_type,
                byte_fallback=arguments.byte_fallback,
                num_threads=arguments.threads,
                max_sentences=arguments.max_sentences,
            )
    finally:
        signal.signal(signal.SIGINT, interrupt)
    with writable(out):
        partial_path(out).write_bytes(model)
        put_in_place(out)
    tokenizer = load_tokenizer(out, setting="--out")
    num_characters = sum(map(len, shown))
    num_tokens = sum(map(len, tokenizer.encode_batch(shown)))
    say(
        console,
        f"{out}: {tokenizer.vocab_size - 1:,} pieces; {num_characters / max(1, num_tokens):.2f} characters a token on "
        f"the first {len(shown):,} documents",
    )
    source = f" --source {shlex.quote(arguments.source)}" if arguments.source else ""
    show_next(
        console,
        f"python tools/prepare_data.py prepare{source} --tokenizer {shlex.quote(str(out))} --out "
        f"{shlex.quote(str(out.with_suffix('')))}",
    )
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Is a prepared folder whole?"""
    from imdm_scale.data.inspection import verify as verify_folder
    from imdm_scale.data.inspection_tables import contents_table, histogram_table, show_samples

    console = Console()
    with opened(arguments.folder, arguments.threads) as folder:
        manifest = folder.manifest
        say(console, headline(folder.url, manifest), style="bold")
        console.print(contents_table(manifest))
        with reading(
            console, "verifying", sum(split.num_bytes for split in manifest.splits.values())
        ) as report:
            found = verify_folder(folder, arguments.samples, arguments.seed, arguments.threads, report)
    console.print(histogram_table(found.counts_V, found.tokenizer))
    num_used = int((found.counts_V > 0).sum())
    num_unused = len(found.counts_V) - num_used
    say(console, f"{num_used:,} ids occur, {num_unused:,} never do, the mask's among them\n")
    if found.tokenizer is not None:
        console.print(show_samples(found.samples, found.tokenizer))
    for damage in found.damages:
        say(console, f"damaged: {damage}", style="red")
    num_shards = sum(len(split.shards) for split in manifest.splits.values())
    if found.damages:
        number = f"{len(found.damages)} damage{'s' * (len(found.damages) > 1)}"
        say(console, f"{number} found in {num_shards:,} shards.", style="bold red")
        return 1
    say(
        console,
        f"All {num_shards:,} shards are whole; the data's hash is {manifest.hash[:16]}.",
        style="bold",
    )
    return 0


def stats(arguments: argparse.Namespace) -> int:
    """What is in a prepared folder?"""
    from imdm_scale.data.inspection import split_statistics
    from imdm_scale.data.inspection_tables import statistics_table
    from imdm_scale.data.tokenizer import load_tokenizer

    console = Console()
    with opened(arguments.folder, threads=1) as folder:
        manifest = folder.manifest
        tokenizer = load_tokenizer(folder.tokenizer_folder(), setting="the data's own tokenizer")
        with reading(console, "reading") as report:
            statistics = {
                name: split_statistics(folder, name, arguments.max_blocks, report) for name in manifest.splits
            }
    title = headline(folder.url, manifest)
    say(console, title, style="bold")
    console.print(statistics_table(statistics, tokenizer))
    if arguments.out is not None:
        from imdm_scale.data.inspection_plot import plot_statistics

        plot_statistics(statistics, tokenizer, title, arguments.out)
        say(console, f"plot written to {arguments.out}")
    return 0


COMMANDS = {"prepare": prepare, "train-tokenizer": train_tokenizer, "verify": verify, "stats": stats}


def source_spec(arguments: argparse.Namespace) -> SourceSpec:
    """The source that the arguments name."""
    from imdm_scale.data.sources import SourceSpec

    return SourceSpec(
        path=arguments.source,
        name=arguments.name,
        text_column=arguments.text_column,
        text_unit=arguments.text_unit,
        streaming=arguments.streaming,
        detokenizer=arguments.detokenizer,
        train=arguments.train,
        valid=arguments.valid,
    )


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """What the disk refuses within it becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file.") from None


@contextmanager
def opened(url: str, threads: int) -> Iterator[PreparedFolder]:
    """A prepared folder; shards of a URL pass through a temporary cache, so that the URL's own bytes are read."""
    from imdm_scale.data.folder import FetchSettings, PreparedFolder

    with tempfile.TemporaryDirectory(prefix="imdm_scale_", ignore_cleanup_errors=True) as cache:
        fetch = FetchSettings(cache_dir=Path(cache), cache_bytes=0, attempts=3)
        folder = PreparedFolder.open(url, fetch)
        shards = [shard for split in folder.manifest.splits.values() for shard in split.shards]
        room = (threads + 1) * max(shard.num_bytes for shard in shards)
        yield PreparedFolder(folder.url, folder.manifest, dataclasses.replace(fetch, cache_bytes=room))


def headline(where: str, manifest: Manifest) -> str:
    """A prepared folder in a line."""
    if manifest.holds_pairs:
        return f"{where}: pairs of {manifest.length:,} tokens, sampled in {manifest.options['steps']:,} steps"
    return f"{where}: blocks of {manifest.length:,} tokens, {manifest.options['packing']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
