"""A look into prepared data: is the folder whole, and what is in it?

Blocks are looked at about a million tokens at a time, so memory does not grow with the corpus.

B blocks, L tokens in a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from imdm_scale.data.folder import DamagedShard, PreparedFolder
from imdm_scale.data.manifest import Manifest, Shard, Split
from imdm_scale.data.pair_inspection import pair_faults
from imdm_scale.data.pairs import unpack_pairs
from imdm_scale.data.tokenizer import Tokenizer, load_tokenizer
from imdm_scale.errors import UserError

PIECE_TOKENS = 2**20
"""Tokens that are looked at together."""
ENTROPY_BIN = 0.01
"""Width in nats of a bin of `SplitStatistics.entropy_histogram`."""
SAMPLED_SHARDS = 16
"""Shards that a sample of blocks is taken from."""

Report = Callable[[Shard], None]


@dataclass(frozen=True)
class Sample:
    """A block to read."""

    split: str
    block: int
    """Its place in the split."""
    ids_L: np.ndarray


@dataclass
class Verification:
    """What `verify` found."""

    counts_V: np.ndarray
    """How often each id occurs in the shards that could be read, int64 (V,)."""
    damages: list[str] = field(default_factory=list)
    """A sentence each; empty if all is well."""
    samples: list[Sample] = field(default_factory=list)
    tokenizer: Tokenizer | None = None
    """The folder's own; None if it cannot be read."""


def verify(
    folder: PreparedFolder,
    num_samples: int = 3,
    seed: int = 0,
    threads: int = 4,
    report: Report = lambda shard: None,
) -> Verification:
    """Holds every byte of a prepared folder against its manifest.

    Checked are the size and SHA-256 of each shard, its shape and type, that its ids are below the vocabulary's size
    and never the mask's, that BOS and EOS frame its blocks where the packing says so, the counts of each split, and
    that the tokenizer beside the shards is the one that made the ids.

    Args:
        num_samples: blocks to draw; those of damaged shards are left out.
        seed: of that draw.
        threads: shards that are read at once.
        report: called in this thread with each shard that was read, in order.

    Raises:
        UserError: the cache for shards of a URL cannot be written.
    """
    manifest = folder.manifest
    found = Verification(np.zeros(manifest.tokenizer.vocab_size, np.int64))
    try:
        found.tokenizer = load_tokenizer(folder.tokenizer_folder(), setting="the data's own tokenizer")
        found.damages += _tokenizer_damages(found.tokenizer, manifest)
    except UserError as error:
        found.damages.append(str(error))
    for name, split in manifest.splits.items():
        found.damages += _count_damages(name, split, manifest)
    drawn = _draw_blocks(manifest, num_samples, seed)
    pool = ThreadPoolExecutor(threads)
    try:
        pending: list[tuple[str, int, Shard, Future[_Findings]]] = []
        for name, split in manifest.splits.items():
            first = 0
            for shard in split.shards:
                rows = [block - first for block in drawn[name] if first <= block < first + shard.num_blocks]
                pending.append((name, first, shard, pool.submit(_examine, folder, shard, rows, first)))
                first += shard.num_blocks
        for name, first, shard, future in pending:
            findings = future.result()
            found.damages += findings.damages
            found.counts_V += findings.counts_V
            found.samples += [Sample(name, first + row, ids_L) for row, ids_L in findings.rows.items()]
            report(shard)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the shards not begun yet are left alone
    return found


@dataclass
class _Findings:
    """What is in one shard."""

    counts_V: np.ndarray
    damages: list[str] = field(default_factory=list)
    rows: dict[int, np.ndarray] = field(default_factory=dict)


def _examine(folder: PreparedFolder, shard: Shard, rows: Sequence[int], first: int) -> _Findings:
    """Everything about one shard, whose first row is number `first` of its split, and `rows` of it."""
    manifest = folder.manifest
    record = manifest.tokenizer
    found = _Findings(np.zeros(record.vocab_size, np.int64))
    try:
        blocks_BL = folder.open_shard(shard)
    except DamagedShard as error:
        found.damages.append(str(error))
        return found
    if manifest.holds_pairs:
        found.damages += _damages(shard, pair_faults(blocks_BL, manifest, first), "make the pairs again")
        blocks_BL = unpack_pairs(blocks_BL).x_0_BL
    num_foreign = num_unframed = 0
    for ids_BL in _pieces(blocks_BL):
        is_foreign_BL = ids_BL >= record.vocab_size
        num_foreign += int(is_foreign_BL.sum())
        found.counts_V += np.bincount(ids_BL[~is_foreign_BL], minlength=record.vocab_size)
        is_framed_B = (ids_BL[:, 0] == record.bos_id) & (ids_BL[:, -1] == record.eos_id)
        num_unframed += int((~is_framed_B).sum())
    if not manifest.holds_pairs:
        faults = [
            (num_foreign, f"ids of {record.vocab_size} or more, which the tokenizer does not have"),
            (int(found.counts_V[record.mask_id]), f"mask tokens (id {record.mask_id}), which no text has"),
            (
                num_unframed if manifest.is_framed else 0,
                f"blocks that do not begin with BOS (id {record.bos_id}) and end with EOS (id {record.eos_id})",
            ),
        ]
        found.damages += _damages(shard, faults, "prepare the data again")
    found.rows = {row: np.array(blocks_BL[row]) for row in rows}
    return found


def _damages(shard: Shard, faults: list[tuple[int, str]], remedy: str) -> list[str]:
    """A sentence for each fault that occurs."""
    return [f"{shard.file} holds {number:,} {what}; {remedy}." for number, what in faults if number]


def _tokenizer_damages(tokenizer: Tokenizer, manifest: Manifest) -> list[str]:
    """Where the tokenizer beside the shards is not the one that made the ids."""
    return [
        f"the folder's tokenizer has {name} {has}, but the manifest says {says}; copy the folder again."
        for name in ("fingerprint", "vocab_size", "bos_id", "eos_id", "mask_id")
        if (has := getattr(tokenizer, name)) != (says := getattr(manifest.tokenizer, name))
    ]


def _count_damages(name: str, split: Split, manifest: Manifest) -> list[str]:
    """Where the counts of a split contradict each other."""
    packing, length = manifest.options["packing"], manifest.length
    if manifest.holds_pairs:
        has, says = split.num_blocks, manifest.options["num_pairs"]
        unit = "pairs, but as many were to be made"
    elif packing == "document":
        has, says = split.num_blocks, split.num_documents
        unit = "blocks, but as many documents"
    else:
        has = split.num_blocks * (length if packing == "plain" else length - 2)
        says = split.num_tokens - split.num_dropped
        unit = "tokens in its blocks, but as many tokens less dropped ones"
    if has == says:
        return []
    return [f"the {name} split has {has:,} {unit}: {says:,}; prepare the data again."]


def _draw_blocks(manifest: Manifest, num_samples: int, seed: int) -> dict[str, list[int]]:
    """Which blocks of each split are shown, ascending."""
    sizes = [split.num_blocks for split in manifest.splits.values()]
    generator = np.random.default_rng(seed)
    drawn = np.sort(generator.choice(sum(sizes), min(num_samples, sum(sizes)), replace=False, shuffle=False))
    parts = np.split(drawn, np.searchsorted(drawn, np.cumsum(sizes)[:-1]))
    firsts = np.cumsum(sizes) - sizes
    return {
        name: (part - first).tolist()
        for name, part, first in zip(manifest.splits, parts, firsts, strict=True)
    }


@dataclass
class SplitStatistics:
    """What is in the blocks of one split, special tokens included."""

    split: Split
    """What the manifest says of it."""
    num_blocks: int
    """Blocks that were read."""
    counts_V: np.ndarray
    """How often each id occurs in them, int64 (V,)."""
    entropy_sum: float
    """Sum of the blocks' entropies in nats."""
    entropy_histogram: np.ndarray
    """Number of blocks by entropy, int64: bin i is [i, i + 1) times `ENTROPY_BIN`."""

    @property
    def unigram_entropy(self) -> float:
        """-sum_v f_v ln f_v in nats, with f_v the share of id v among all tokens."""
        counts = self.counts_V[self.counts_V > 0]
        shares = counts / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    @property
    def block_entropy(self) -> float:
        """Mean over the blocks of each one's own entropy: what samples of a model are compared with."""
        return self.entropy_sum / self.num_blocks


def split_statistics(
    folder: PreparedFolder, name: str, max_blocks: int | None = None, report: Report = lambda shard: None
) -> SplitStatistics:
    """Counts and entropies of one split, its shards read one after the other.

    Args:
        max_blocks: read about so many, evenly spaced in at most `SAMPLED_SHARDS` shards; None reads all.
        report: called with each shard that was read.

    Raises:
        UserError: a shard is missing, not what the manifest says, or has ids that the tokenizer does not have.
    """
    manifest = folder.manifest
    if manifest.holds_pairs:
        raise UserError(
            f"{folder.url} holds pairs, of which there are no statistics; `tools/prepare_data.py verify` looks at them."
        )
    split = manifest.splits[name]
    shards = list(split.shards)
    if max_blocks is not None and max_blocks < split.num_blocks:
        shards = [shards[i] for i in _evenly_spaced(len(shards), min(SAMPLED_SHARDS, max_blocks))]
    share = min(1.0, (max_blocks or split.num_blocks) / sum(shard.num_blocks for shard in shards))
    num_bins = math.ceil(math.log(manifest.length) / ENTROPY_BIN) + 1
    found = SplitStatistics(
        split, 0, np.zeros(manifest.tokenizer.vocab_size, np.int64), 0.0, np.zeros(num_bins, np.int64)
    )
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        blocks_BL = folder.open_shard(shard)
        if following is not None:
            folder.prefetch([following])
        rows = _evenly_spaced(shard.num_blocks, max(1, round(share * shard.num_blocks)))
        for ids_BL in _pieces(blocks_BL, rows):
            if ids_BL.max() >= manifest.tokenizer.vocab_size:
                raise UserError(
                    f"{folder.url}/{shard.file} holds the id {ids_BL.max()}, but the tokenizer has only "
                    f"{manifest.tokenizer.vocab_size}; see what `tools/prepare_data.py verify` finds."
                )
            found.num_blocks += len(ids_BL)
            found.counts_V += np.bincount(ids_BL.ravel(), minlength=manifest.tokenizer.vocab_size)
            entropies_B = block_entropies(ids_BL)
            found.entropy_sum += float(entropies_B.sum())
            found.entropy_histogram += np.bincount(
                (entropies_B / ENTROPY_BIN).astype(np.int64), minlength=num_bins
            )
        report(shard)
    return found


def block_entropies(ids_BL: np.ndarray) -> np.ndarray:
    """Entropy in nats of the token frequencies within each block, float64 (B,).

    -sum_v f_v ln f_v with f_v the share of id v among the block's L ids; as `evaluate.metrics.unigram_entropy`, which
    is their mean.
    """
    num_blocks, length = ids_BL.shape
    rows_BL = np.sort(ids_BL, axis=1)
    starts_run_BL = np.ones(rows_BL.shape, dtype=bool)
    starts_run_BL[:, 1:] = rows_BL[:, 1:] != rows_BL[:, :-1]
    run_starts = np.flatnonzero(starts_run_BL)
    counts = np.diff(run_starts, append=rows_BL.size)
    first_runs_B = np.searchsorted(run_starts, np.arange(num_blocks) * length)
    # -sum (c / L) ln (c / L) = ln L - (1 / L) sum c ln c over the runs of equal ids, c of them each.
    return np.log(length) - np.add.reduceat(counts * np.log(counts), first_runs_B) / length


def _evenly_spaced(size: int, count: int) -> np.ndarray:
    """`count` of the numbers 0 to size - 1, or all if there are fewer."""
    count = min(size, count)
    return (np.arange(count) * size + size // 2) // count


def _pieces(blocks_BL: np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """The blocks, or `rows` of them, about `PIECE_TOKENS` tokens at a time, in memory."""
    rows = np.arange(len(blocks_BL)) if rows is None else rows
    step = max(1, PIECE_TOKENS // blocks_BL.shape[1])
    for start in range(0, len(rows), step):
        yield blocks_BL[rows[start : start + step]]
