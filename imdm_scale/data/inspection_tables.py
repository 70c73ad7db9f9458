"""What `inspection` found, as tables and text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from imdm_scale.data.inspection import Sample, SplitStatistics
from imdm_scale.data.manifest import Manifest, Split
from imdm_scale.data.tokenizer import Tokenizer

SHOWN_TOKENS = 20
"""Tokens in the histogram."""
SHOWN_CHARACTERS = 400
"""Of a sample's text."""


def contents_table(manifest: Manifest, rates: Mapping[str, float] | None = None) -> Table:
    """What the manifest says of each split, a column each.

    Args:
        rates: tokens a second with which splits were prepared; None leaves the row out.
    """
    table = Table()
    table.add_column()
    for name in manifest.splits:
        table.add_column(name, justify="right")
    _add_counts(table, list(manifest.splits.values()))
    if rates is not None:
        table.add_row("tokens a second", *(f"{rates[n]:,.0f}" if n in rates else "" for n in manifest.splits))
    return table


def histogram_table(counts_V: np.ndarray, tokenizer: Tokenizer | None) -> Table:
    """The most frequent tokens with their shares, two to a row.

    Args:
        counts_V: how often each id occurs, int64 (V,).
        tokenizer: None shows ids only.
    """
    ranked = ranked_ids(counts_V)[:SHOWN_TOKENS]
    table = Table(title=f"The {len(ranked)} most frequent of {counts_V.sum():,} tokens", title_justify="left")
    num_rows = -(-len(ranked) // 2)
    for heading in ("rank", "token", "id", "share") * 2:
        table.add_column(heading, justify="left" if heading == "token" else "right")
    shares_V = counts_V / max(1, counts_V.sum())
    cells = [
        (str(rank), piece(tokenizer, token_id), str(token_id), percent(shares_V[token_id]))
        for rank, token_id in enumerate(ranked, 1)
    ]
    cells += [("", Text(), "", "")] * (2 * num_rows - len(cells))
    for left, right in zip(cells[:num_rows], cells[num_rows:], strict=True):
        table.add_row(*left, *right)
    return table


def show_samples(samples: list[Sample], tokenizer: Tokenizer) -> Group:
    """The beginning of each sampled block as text."""
    parts: list[Rule | Text] = []
    for sample in samples:
        text = block_text(sample.ids_L, tokenizer)
        cut = f"{text[:SHOWN_CHARACTERS]} ..." if len(text) > SHOWN_CHARACTERS else text
        parts.append(Rule(f"{sample.split}, block {sample.block:,}", align="left"))
        parts.append(Text(f"{cut}\n"))  # Text, not a string: brackets in a sample are no markup
    return Group(*parts)


def block_text(ids_L: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a block, EOS written as its piece where one document ends and another begins."""
    documents = np.split(ids_L, np.flatnonzero(ids_L == tokenizer.eos_id))
    texts = [tokenizer.decode(document.tolist()) for document in documents]
    return f" {tokenizer.token(tokenizer.eos_id)} ".join(filter(None, texts))


def statistics_table(statistics: Mapping[str, SplitStatistics], tokenizer: Tokenizer) -> Table:
    """A column for each split: its counts, its entropies, and the tokens at some ranks of frequency."""
    found = list(statistics.values())
    table = Table()
    table.add_column()
    for name in statistics:
        table.add_column(name, justify="right")
    _add_counts(table, [s.split for s in found])
    table.add_section()
    if any(s.num_blocks < s.split.num_blocks for s in found):
        table.add_row("blocks read", *(f"{s.num_blocks:,}" for s in found))
    table.add_row("different ids", *(f"{np.count_nonzero(s.counts_V):,}" for s in found))
    table.add_row("unigram entropy (nats)", *(f"{s.unigram_entropy:.3f}" for s in found))
    table.add_row("entropy per block, mean (nats)", *(f"{s.block_entropy:.3f}" for s in found))
    table.add_section()
    ranked = [ranked_ids(s.counts_V) for s in found]
    for exponent in range(6):
        rank = 10**exponent
        if rank > max(map(len, ranked)):
            break
        table.add_row(
            f"token of rank {rank:,}",
            *(
                _piece_and_share(ids[rank - 1], s, tokenizer) if rank <= len(ids) else Text("-")
                for ids, s in zip(ranked, found, strict=True)
            ),
        )
    return table


def piece(tokenizer: Tokenizer | None, token_id: int) -> Text:
    """How a token is written in tables: control characters escaped, brackets no markup."""
    name = "?" if tokenizer is None else tokenizer.token(token_id)
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name))


def _add_counts(table: Table, splits: list[Split]) -> None:
    """Rows with the manifest's figures of some splits."""
    table.add_row("documents", *(f"{s.num_documents:,}" for s in splits))
    table.add_row("tokens", *(f"{s.num_tokens:,}" for s in splits))
    table.add_row("tokens per document", *(f"{s.num_tokens / max(1, s.num_documents):,.1f}" for s in splits))
    table.add_row("tokens dropped", *(percent(s.num_dropped / max(1, s.num_tokens)) for s in splits))
    table.add_row("blocks", *(f"{s.num_blocks:,}" for s in splits))
    table.add_row("shards", *(f"{len(s.shards):,}" for s in splits))
    table.add_row("size", *(_size(s.num_bytes) for s in splits))


def _piece_and_share(token_id: int, statistics: SplitStatistics, tokenizer: Tokenizer) -> Text:
    share = statistics.counts_V[token_id] / statistics.counts_V.sum()
    return Text(" ").join([piece(tokenizer, token_id), Text(f"{percent(share):>8}")])


def ranked_ids(counts_V: np.ndarray) -> list[int]:
    """The ids that occur, most frequent first; the smaller id first among equals."""
    order = np.argsort(-counts_V, kind="stable")
    return order[: np.count_nonzero(counts_V)].tolist()


def percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share >= 1e-4 or share == 0 else f"{100 * share:.1g}%"


def _size(num_bytes: int) -> str:
    """A number of bytes in the unit that suits it."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes} bytes"
