"""What is in prepared data, as a picture: how frequent tokens are, and how varied blocks are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from imdm_scale.data.inspection import ENTROPY_BIN, SplitStatistics
from imdm_scale.data.inspection_tables import SHOWN_TOKENS, piece, ranked_ids
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError

MIN_BARS, MAX_BARS = 12, 40
"""Bars of the histogram of entropies, about; fewer where a split is small."""
SHOWN_FROM = 0.001
"""Share of the blocks, those of the lowest entropy, that the histogram leaves out: a few odd ones would stretch it."""
STYLES = (("C0", "-"), ("C1", "--"))
"""Colour and line of the first and of the second split."""


def plot_statistics(
    statistics: Mapping[str, SplitStatistics], tokenizer: Tokenizer, title: str, path: Path
) -> None:
    """Writes a picture, its format by the suffix of `path`.

    Three panels: share of the tokens against their rank of frequency, both logarithmic; blocks by their entropy;
    shares of the most frequent tokens.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(13.0, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_ranks(left, statistics)
    _plot_entropies(middle, statistics)
    _plot_top(right, statistics, tokenizer)
    figure.suptitle(title, fontsize=10, color="0.35")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); name another file.") from None


def _plot_ranks(axes: Axes, statistics: Mapping[str, SplitStatistics]) -> None:
    for (name, found), (color, line) in zip(statistics.items(), STYLES, strict=False):
        shares = np.sort(found.counts_V[found.counts_V > 0])[::-1] / found.counts_V.sum()
        axes.loglog(np.arange(1, len(shares) + 1), shares, line, color=color, label=name)
    axes.set_title("frequency by rank", fontsize=10)
    axes.set_xlabel("rank of the token")
    axes.set_ylabel("share of all tokens")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _plot_entropies(axes: Axes, statistics: Mapping[str, SplitStatistics]) -> None:
    """As shares of each split's blocks, so that a small split is as high as a large one."""
    total = np.sum([found.entropy_histogram for found in statistics.values()], axis=0)
    lowest, highest = np.searchsorted(np.cumsum(total), [SHOWN_FROM * total.sum(), total.sum()])
    smallest = min(found.num_blocks for found in statistics.values())
    num_bars = np.clip(2 * np.sqrt(smallest), MIN_BARS, MAX_BARS)
    width = max(1, round((highest + 1 - lowest) / num_bars))
    firsts = np.arange(lowest % width, highest + 1, width)
    edges = np.append(firsts, firsts[-1] + width) * ENTROPY_BIN
    for (name, found), (color, line) in zip(statistics.items(), STYLES, strict=False):
        shares = np.add.reduceat(found.entropy_histogram, firsts) / found.num_blocks
        axes.stairs(
            shares, edges, color=color, fill=line == "-", alpha=0.45 if line == "-" else 1, linewidth=1.5
        )
        axes.axvline(
            found.block_entropy,
            color=color,
            linestyle=line,
            linewidth=1.2,
            label=f"{name}: mean {found.block_entropy:.3f}",
        )
    axes.set_title("entropy within a block", fontsize=10)
    axes.set_xlabel("nats")
    axes.set_ylabel("share of the split's blocks")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlim(lowest * ENTROPY_BIN, edges[-1])
    axes.set_ylim(top=1.22 * axes.get_ylim()[1])  # room for the legend
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", edgecolor="none", framealpha=0.9)


def _plot_top(axes: Axes, statistics: Mapping[str, SplitStatistics], tokenizer: Tokenizer) -> None:
    """The most frequent tokens of the first split, with their shares in each."""
    first = next(iter(statistics.values()))
    ids = ranked_ids(first.counts_V)[:SHOWN_TOKENS]
    places = np.arange(len(ids))
    marks: list[BarContainer | Line2D] = []
    for (name, found), (color, line) in zip(statistics.items(), STYLES, strict=False):
        shares = found.counts_V[ids] / found.counts_V.sum()
        if line == "-":
            marks.append(axes.barh(places, shares, color=color, alpha=0.45, label=name))
        else:
            marks += axes.plot(shares, places, "|", color=color, markersize=9, markeredgewidth=2, label=name)
    # Pieces are no mathematics: a dollar sign in one is a dollar sign.
    names = [piece(tokenizer, token_id).plain for token_id in ids]
    axes.set_yticks(places, labels=names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_title(f"the {len(ids)} most frequent tokens", fontsize=10)
    axes.set_xlabel("share of all tokens")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25, axis="x")
    axes.legend(handles=marks, frameon=False, loc="lower right")
