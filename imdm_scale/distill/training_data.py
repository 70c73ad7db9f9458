"""The data of a run: found and, where they are not prepared, prepared by one rank; opened by all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from rich.console import Console

from imdm_scale.config.tree import Config, DataConfig
from imdm_scale.data.folder import FetchSettings, PreparedFolder
from imdm_scale.data.manifest import FILE_NAME, Manifest, TokenizerRecord
from imdm_scale.data.mixture import Mixture
from imdm_scale.data.place import Place
from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.prepared_corpus import PreparedCorpus
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.stream import Stream, TokenStream
from imdm_scale.data.synthetic_source import id_tokenizer, is_synthetic, prepare_synthetic, synthetic_source
from imdm_scale.data.tokenizer import Tokenizer, load_tokenizer
from imdm_scale.errors import UserError

MOST_TEXT = 1 << 30
"""Bytes of text that a run prepares by itself; more would keep all ranks waiting."""

T = TypeVar("T")


@dataclass(frozen=True)
class FoundCorpus:
    """One entry of `data.path`."""

    path: str | None
    """As it is set; None is the packaged books."""
    manifest: Manifest | None
    """None where it is text or a synthetic task, which has yet to be prepared."""


@dataclass(frozen=True)
class FoundData:
    """What `data.path` and `tokenizer.path` name; the same on every rank."""

    corpora: tuple[FoundCorpus, ...]
    """The text; of pairs, what they were made from, if it is needed."""
    tokenizer: Tokenizer
    pairs: tuple[FoundCorpus, ...] = ()
    """Folders of pairs, where the run learns from such."""


@dataclass(frozen=True)
class TrainingData:
    """The blocks of a run."""

    stream: Stream
    """All training blocks."""
    first_sample: int
    """Number in the stream of the run's first sample."""
    texts: tuple[PreparedFolder, ...]
    """The text: what is trained on, or what the pairs were made from, none where that is not needed."""
    skip_damaged: bool
    """Whether shards that cannot be read are left out."""
    bos_id: int | None
    """Id with which every block begins; None where not all do, so that position 0 is text like any other."""
    pairs_seed: int | None = None
    """Seed of the pairs, where the blocks are such."""

    def first_blocks(self, split: str, max_tokens: int) -> np.ndarray:
        """The first blocks of every text, (number of blocks, L), about `max_tokens` tokens at most in all."""
        each = max(1, max_tokens // (self.texts[0].manifest.length * len(self.texts)))
        parts = [folder.first_blocks(split, each, self.skip_damaged) for folder in self.texts]
        return np.concatenate(parts)


def find_data(config: Config, main_rank: int) -> FoundData:
    """Read the manifests and the tokenizer on one rank and tell all. Collective.

    Raises:
        UserError: on that rank: something is not there, or does not fit together.
    """
    return told_by(main_rank, lambda: _find(config))


def open_data(
    config: Config,
    found: FoundData,
    run_dir: Path,
    main_rank: int,
    console: Console,
    first_sample_of: Callable[[Stream], int] | None = None,
) -> TrainingData:
    """The streams of all corpora as one. Text is first prepared, by one rank, into `run_dir`/data. Collective.

    Args:
        first_sample_of: stream -> number of the run's first sample, for a run that goes on from a checkpoint; None
            goes by `data.continue_from`.

    Raises:
        UserError: text that cannot be prepared; a cache that is too small; a place in the data that is not
            this stream's.
    """
    fetch = fetch_settings(config.data)

    def all_prepared() -> list[tuple[str, Manifest]]:
        parts = []
        for index, corpus in enumerate(found.corpora):
            if corpus.manifest is not None:
                assert corpus.path is not None
                parts.append((corpus.path, corpus.manifest))
                continue
            out = run_dir / "data" / str(index)
            with console.status(f"preparing {corpus.path or 'the packaged books'}"):
                parts.append((str(out), _prepared(corpus.path, config.model.length, found.tokenizer, out)))
        return parts

    texts = tuple(PreparedFolder(url, manifest, fetch) for url, manifest in told_by(main_rank, all_prepared))
    pairs = tuple(
        PreparedFolder(found.path, found.manifest, fetch)
        for found in found.pairs
        if found.path is not None and found.manifest is not None
    )
    folders = pairs or texts
    _check_cache(config.data, folders)
    skip = config.data.on_damage == "skip"
    streams = [TokenStream(PreparedCorpus(folder, "train"), config.seed, skip) for folder in folders]
    stream = streams[0] if len(streams) == 1 else Mixture(streams, config.data.weights)
    first_sample = 0
    if first_sample_of is not None:
        first_sample = first_sample_of(stream)
    elif config.data.continue_from is not None:
        place = Place.read(Path(config.data.continue_from))
        place.check(stream)
        first_sample = place.samples
    return TrainingData(
        stream,
        first_sample,
        texts,
        skip,
        found.tokenizer.bos_id if all(folder.manifest.is_framed for folder in folders) else None,
        pairs_seed=pairs[0].manifest.options["seed"] if pairs else None,
    )


def fetch_settings(data: DataConfig) -> FetchSettings:
    """How shards behind a URL come to this machine."""
    if data.cache_dir is not None:
        cache_dir = Path(data.cache_dir)
    else:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imdm_scale"
    return FetchSettings(
        cache_dir=cache_dir,
        cache_bytes=int(data.cache_gib * 2**30),
        attempts=data.attempts,
        timeout=data.timeout,
    )


def told_by(main_rank: int, make: Callable[[], T]) -> T:
    """What `make` gives on one rank, on all ranks. Collective."""
    made = [make() if dist.get_rank() == main_rank else None]
    dist.broadcast_object_list(made, src=main_rank)
    assert made[0] is not None
    return made[0]


def _find(config: Config) -> FoundData:
    fetch = fetch_settings(config.data)
    setting = config.data.path
    pairs: list[PreparedFolder] = []
    if config.method.name == "im_redi":
        pairs = _find_pairs(config, fetch)
        # The text from which they were made: what the table at the end compares with.
        sources = {folder.manifest.source["data"]: None for folder in pairs}
        setting = list(sources) if config.evaluate.at_end else []
    given = load_tokenizer(config.tokenizer.path) if config.tokenizer.path is not None else None
    corpora: list[FoundCorpus] = []
    folders: list[PreparedFolder] = list(pairs)
    tasks: dict[str, Tokenizer] = {}
    for path in setting if isinstance(setting, list) else [setting]:
        manifest = None
        if path is not None and is_synthetic(path):
            tasks[path] = id_tokenizer(synthetic_source(path, config.model.length).task.vocab_size)
        elif path is None or ("://" not in path and not (Path(path) / FILE_NAME).is_file()):
            _check_size(path)
        else:
            folder = PreparedFolder.open(path, fetch)
            if folder.manifest.holds_pairs:
                raise UserError(
                    f"data.path {path} holds pairs of states and texts, but method.name is {config.method.name}, which "
                    "learns from text; set method.name=im_redi, or data.path to text."
                )
            manifest = folder.manifest
            _check_prepared(path, manifest, config.model.length)
            folders.append(folder)
        corpora.append(FoundCorpus(path, manifest))
    if tasks and len(tasks) + len(folders) - len(pairs) < len(corpora):
        raise UserError(
            f"data.path lists both text and {next(iter(tasks))}, whose ids are no words; train on one of the two."
        )
    if given is None:
        if folders:
            given = load_tokenizer(folders[0].tokenizer_folder())
        else:
            given = next(iter(tasks.values()), None) or load_tokenizer(None)
    makers: dict[str, TokenizerRecord | Tokenizer] = {
        **{folder.url: folder.manifest.tokenizer for folder in folders},
        **tasks,
    }
    for url, record in makers.items():
        if record.fingerprint != given.fingerprint:
            of_run = config.tokenizer.path and f"tokenizer.path {config.tokenizer.path}"
            raise UserError(
                f"the token ids of {url} (tokenizer {record.fingerprint[:12]}, {record.vocab_size} ids) and "
                f"of {of_run or next(iter(makers))} (tokenizer {given.fingerprint[:12]}, "
                f"{given.vocab_size} ids) mean different words; leave tokenizer.path null, or prepare the data with "
                "the tokenizer that the run is to have."
            )
    return FoundData(
        tuple(corpora), given, tuple(FoundCorpus(folder.url, folder.manifest) for folder in pairs)
    )


def _find_pairs(config: Config, fetch: FetchSettings) -> list[PreparedFolder]:
    """The folders of pairs in `data.path`.

    Raises:
        UserError: one is no such folder, or they do not fit together or the model.
    """
    setting = config.data.path
    folders = []
    for path in setting if isinstance(setting, list) else [setting]:
        assert path is not None, "config.check asks for it"
        folder = PreparedFolder.open(path, fetch)
        manifest = folder.manifest
        if not manifest.holds_pairs:
            raise UserError(
                f"data.path {path} holds text, but method.name is im_redi, which learns from pairs that a teacher "
                "made; make them from it with tools/generate_pairs.py."
            )
        if manifest.length != config.model.length:
            raise UserError(
                f"model.length is {config.model.length}, but the pairs in {path} have {manifest.length} tokens; set "
                f"model.length={manifest.length}."
            )
        noise, own = manifest.options["noise"], [config.model.noise_kind, config.model.noise_scale]
        if noise is not None and noise != own and not config.method.fresh_noise:
            raise UserError(
                f"model.noise_kind and model.noise_scale are {own[0]} and {own[1]:g}, but the noise of the pairs in "
                f"{path} is {noise[0]} with scale {noise[1]:g}, which they name; set the two to that."
            )
        folders.append(folder)
    seeds = [folder.manifest.options["seed"] for folder in folders]
    if len(set(seeds)) > 1:
        raise UserError(
            f"data.path lists pairs of the seeds {', '.join(map(str, seeds))}, but one seed must name all their noise; "
            "make one folder of as many pairs."
        )
    return folders


def _prepared(path: str | None, length: int, tokenizer: Tokenizer, out: Path) -> Manifest:
    """Text or a synthetic task as a prepared folder."""
    if path is not None and is_synthetic(path):
        return prepare_synthetic(synthetic_source(path, length), out)
    return prepare(SourceSpec(path), tokenizer, PrepareOptions(length=length), out)


def _check_prepared(path: str, manifest: Manifest, length: int) -> None:
    if manifest.length != length:
        raise UserError(
            f"model.length is {length}, but the data in {path} have blocks of {manifest.length} tokens; set "
            f"model.length={manifest.length}, or prepare them again with --length {length}."
        )
    for split in ("train", "valid"):
        if split not in manifest.splits:
            raise UserError(
                f"the data in {path} have no {split} split (only {', '.join(manifest.splits)}), and training needs "
                "train and valid; prepare them again with both."
            )


def _check_size(path: str | None) -> None:
    if path is None:
        return
    files = (
        [Path(path)] if Path(path).is_file() else [file for file in Path(path).rglob("*") if file.is_file()]
    )
    size = sum(file.stat().st_size for file in files)
    if size > MOST_TEXT:
        raise UserError(
            f"data.path {path} holds {size / 2**30:.1f} GiB of text, more than the {MOST_TEXT >> 30} GiB that a run "
            f"prepares by itself; run `tools/prepare_data.py prepare --source {path} --out DIR`, then data.path=DIR."
        )


def _check_cache(data: DataConfig, folders: tuple[PreparedFolder, ...]) -> None:
    """Every corpus behind a URL needs room for its windows, and all share one cache."""
    needed = sum(folder.required_bytes("train") for folder in folders)
    if needed > data.cache_gib * 2**30:
        raise UserError(
            f"data.cache_gib is {data.cache_gib:g}, but the shards that are read and fetched at a time take "
            f"{needed / 2**30:.3g} GiB; set it to that at least, or prepare the data with a smaller --shuffle-window "
            "or --shard-mib."
        )
