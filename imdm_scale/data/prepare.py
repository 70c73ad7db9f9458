"""Text to token shards with a manifest: what `tools/prepare_data.py prepare` does, and training where it is given text.

The bytes depend on the text, the tokenizer and the options alone. An interruption at any moment costs the shard that is
not whole: the same call goes on behind the last whole one.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from imdm_scale.data.durable import partial_path, put_in_place, sync, write_whole
from imdm_scale.data.manifest import FILE_NAME, FORMAT, TOKENIZER_FOLDER, Manifest, Split, TokenizerRecord
from imdm_scale.data.output_folder import SPLITS, alone_in, finished_manifest, tidy, writing
from imdm_scale.data.packing import BlockLayout, Packing, PackState, finish, pack
from imdm_scale.data.resuming import FinishedShard, begin_or_go_on
from imdm_scale.data.shards import ShardWriter, shard_dtype
from imdm_scale.data.sources import Documents, SourceSpec, open_documents
from imdm_scale.data.tokenising import Rows, TokenisingPool
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

ROWS_PER_READ = 256
"""Rows that are read from the source at a time."""
CHARACTERS_PER_BATCH = 1 << 18
"""Text that is tokenised at a time (a document is not cut): about a tenth of a second of work."""
MAX_ROWS_PER_BATCH = 1 << 14
"""Rows that are tokenised at a time, however short."""
REPORT_SECONDS = 0.5
"""Least time between two reports."""


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes shards. All of it decides about the bytes, or about the order in which they are read."""

    length: int = 1024
    """Tokens in a block."""
    packing: Packing = "wrapped"
    """See `BlockLayout.packing`."""
    documents_per_group: int = 1000
    """wrapped, plain: the rest of each group of so many documents (rows of the source) is dropped, as in the
    literature; 0 drops only the end of the corpus."""
    document_eos: bool = True
    """wrapped, plain: EOS after each document."""
    shard_bytes: int = 64 * 2**20
    """Largest size of a shard, unless one block is larger."""
    shuffle_window: int = 8
    """Shards whose blocks are shuffled together when the data are streamed."""

    def __post_init__(self) -> None:
        """Raises UserError for a value that is not allowed."""
        shortest = 1 if self.packing == "plain" else 3
        allowed = {
            "packing": (self.packing in get_args(Packing), f"one of {', '.join(get_args(Packing))}"),
            "length": (self.length >= shortest, f"at least {shortest} with packing {self.packing}"),
            "documents_per_group": (self.documents_per_group >= 0, "0 or more"),
            "shard_bytes": (self.shard_bytes >= 1, "at least 1"),
            "shuffle_window": (self.shuffle_window >= 1, "at least 1"),
        }
        for name, (is_allowed, what) in allowed.items():
            if not is_allowed:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {what}.")


@dataclass(frozen=True)
class Progress:
    """How far the preparation of a split is, what earlier tries did included."""

    split: str
    documents: int
    """Rows of the source, blank ones among them."""
    total: int | None
    """Rows of the split; None where a streaming source does not tell."""
    tokens: int
    """See `manifest.Split.num_tokens`."""
    blocks: int
    seconds: float
    """Time that this try spent on this split."""
    tokens_before: int
    """Of `tokens`, those that earlier tries tokenised: the rate is (tokens - tokens_before) / seconds."""


def prepare(
    spec: SourceSpec,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    out: Path,
    workers: int = 1,
    report: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenises and packs a corpus into `out`, or goes on where an earlier try was interrupted.

    Where `out` holds exactly this already, its manifest is returned at once, without a look at the text. The validation
    split is made first: it is small, so that what is wrong with it shows early.

    Args:
        out: made if need be.
        workers: processes that tokenise; with 1 this process does it.
        report: is called at most about twice a second, and at the end of each split.

    Raises:
        UserError: the source cannot be read or has too little text; `out` holds something else, is being prepared by
            another process or cannot be written; a worker process died. What is finished is kept in all cases.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1.")
    plan = Manifest(
        format=FORMAT,
        length=options.length,
        dtype=shard_dtype(tokenizer.vocab_size),
        shuffle_window=options.shuffle_window,
        tokenizer=TokenizerRecord.of(tokenizer),
        source=_without(dataclasses.asdict(spec), "streaming"),  # a way to read the same text
        options=_without(dataclasses.asdict(options), "length", "shuffle_window"),  # which stand above
        splits={},
    )
    finished = finished_manifest(out, plan)
    if finished is not None:
        return finished
    with alone_in(out):
        finished = finished_manifest(out, plan)  # by another process, just before this one was alone
        if finished is not None:
            return finished
        return _Preparation(spec, tokenizer, plan, out, report).run(workers)


class _Preparation:
    """One try to prepare a folder, by the process that is alone in it."""

    def __init__(
        self,
        spec: SourceSpec,
        tokenizer: Tokenizer,
        plan: Manifest,
        out: Path,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.tokenizer, self.plan, self.out, self.report = tokenizer, plan, out, report
        self.source = "the embedded corpus" if spec.path is None else spec.path
        opened = {name: open_documents(spec, name) for name in SPLITS}
        self.documents: dict[str, Documents] = {
            name: documents for name, documents in opened.items() if documents is not None
        }
        if not self.documents:
            raise UserError("train and valid are both none, but one split must have text; name one of them.")
        self.layout = BlockLayout(
            packing=plan.options["packing"],
            length=plan.length,
            documents_per_group=plan.options["documents_per_group"],
            document_eos=plan.options["document_eos"],
            bos_id=plan.tokenizer.bos_id,
            eos_id=plan.tokenizer.eos_id,
            dtype=plan.dtype,
        )
        identities: dict[str, str] = {name: documents.identity for name, documents in self.documents.items()}
        self.unfinished = begin_or_go_on(out, plan, identities)

    def run(self, workers: int) -> Manifest:
        """Makes what is missing, then writes and returns the manifest."""
        splits = self.unfinished.splits
        with writing(self.out):
            self.unfinished.save(self.out)
            self._save_tokenizer()
        missing = [name for name in reversed(SPLITS) if name in splits and splits[name].end is None]
        with TokenisingPool(self.tokenizer, self.plan.dtype, workers if missing else 1) as pool:
            for name in missing:
                self._prepare_split(name, pool)
        summaries: dict[str, Split] = {name: splits[name].summary() for name in SPLITS if name in splits}
        manifest = dataclasses.replace(self.plan, splits=summaries)
        with writing(self.out):
            write_whole(self.out / FILE_NAME, manifest.to_json())
            tidy(self.out)
        return manifest

    def _prepare_split(self, name: str, pool: TokenisingPool) -> None:
        """Makes the shards of a split that are missing."""
        split, documents, plan = self.unfinished.splits[name], self.documents[name], self.plan
        state = split.state
        to_skip = split.num_blocks - state.num_blocks
        reporter = _Reporter(self.report, name, documents.num_documents, state)
        with writing(self.out):
            writer = ShardWriter(
                self.out / name, plan.length, plan.dtype, plan.options["shard_bytes"], len(split.shards)
            )
        with closing(writer):
            for tokens in pool.map(_batches(name, documents, state.num_rows)):
                before = state
                state, blocks_BL = pack(self.layout, before, tokens.ids_N, tokens.lengths_R)
                new_BL = blocks_BL[to_skip:]
                to_skip -= len(blocks_BL) - len(new_BL)
                with writing(self.out):
                    shards = writer.write(new_BL)
                    if shards:
                        split.shards += [FinishedShard(shard, before) for shard in shards]
                        self.unfinished.save(self.out)
                reporter.tell(state)
            state = finish(state)
            self._check_enough(name, state)
            with writing(self.out):
                split.shards += [FinishedShard(shard, state) for shard in writer.finish()]
                split.end = state
                self.unfinished.save(self.out)
        reporter.tell(state, at_once=True)

    def _check_enough(self, name: str, end: PackState) -> None:
        if end.num_documents == 0:
            raise UserError(
                f"The {name} split of {self.source} holds no document with text (in {end.num_rows} rows); name another "
                "split or text, or another column of it."
            )
        if end.num_blocks == 0:
            groups = self.layout.packing != "document" and self.layout.documents_per_group
            less = ", or set documents_per_group to 0" if groups and groups < end.num_rows else ""
            raise UserError(
                f"The {name} split of {self.source} does not fill one block of {self.plan.length} tokens (it has "
                f"{end.num_tokens}); give more text, or shorten the blocks{less}."
            )

    def _save_tokenizer(self) -> None:
        """Writes the tokenizer's folder; it takes its name when it is whole and on the disk."""
        folder = self.out / TOKENIZER_FOLDER
        partial = partial_path(folder)
        for old in (partial, folder):
            if old.exists():
                shutil.rmtree(old)
        partial.mkdir()
        self.tokenizer.save(partial)
        for file in partial.rglob("*"):
            sync(file)
        put_in_place(folder)


def _batches(split: str, documents: Documents, first: int) -> Iterator[Rows]:
    """The rows of a split from number `first` on, cut into pieces of about the same work."""
    texts: list[str] = []
    num_characters = 0
    for part in documents.batches(first, ROWS_PER_READ):
        for text in part:
            texts.append(text)
            num_characters += len(text)
            if num_characters >= CHARACTERS_PER_BATCH or len(texts) == MAX_ROWS_PER_BATCH:
                yield Rows(split, first, texts)
                first += len(texts)
                texts, num_characters = [], 0
    if texts:
        yield Rows(split, first, texts)


class _Reporter:
    """Calls `report` now and then."""

    def __init__(
        self, report: Callable[[Progress], None] | None, split: str, total: int | None, start: PackState
    ) -> None:
        self._report, self._split, self._total = report, split, total
        self._tokens_before = start.num_tokens
        self._started = time.monotonic()
        self._next = self._started

    def tell(self, state: PackState, at_once: bool = False) -> None:
        """Reports how far the split is, unless that was done a moment ago."""
        now = time.monotonic()
        if self._report is None or (now < self._next and not at_once):
            return
        self._next = now + REPORT_SECONDS
        self._report(
            Progress(
                split=self._split,
                documents=state.num_rows,
                total=self._total,
                tokens=state.num_tokens,
                blocks=state.num_blocks,
                seconds=now - self._started,
                tokens_before=self._tokens_before,
            )
        )


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
