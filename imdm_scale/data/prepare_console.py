"""What tools/prepare_data.py shows on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

if TYPE_CHECKING:  # the command line loads this file before it knows what it will need
    from imdm_scale.data.manifest import Shard
    from imdm_scale.data.prepare import Progress

LINE_SECONDS = 10.0
"""Least time between two lines where the output is no terminal."""
OPENING = "opening the source: its text is converted once, into a cache"
"""Shown until a split begins: a large corpus is first downloaded, and passed over once by the datasets library."""


class PreparationReport:
    """A live bar for each split on a terminal; a line now and then elsewhere. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description:5}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._opening = self._bar.add_task("", total=None, figures=OPENING)
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()
        self._ended: set[str] = set()
        self.rates: dict[str, float] = {}
        """Tokens a second by split, of those that this try worked on."""

    def show(self, progress: Progress) -> None:
        """Show how far a split is."""
        split = progress.split
        self.rates[split] = (progress.tokens - progress.tokens_before) / max(progress.seconds, 1e-9)
        figures = self._figures(progress)
        self._bar.update(self._opening, visible=False)
        if split not in self._tasks:
            self._tasks[split] = self._bar.add_task(split, total=progress.total, figures=figures)
        self._bar.update(self._tasks[split], completed=progress.documents, figures=figures)
        now = time.monotonic()
        at_end = progress.documents == progress.total and split not in self._ended
        if not self._console.is_terminal and (at_end or now - self._last_line >= LINE_SECONDS):
            self._console.print(f"{split:5}  {figures}", highlight=False, soft_wrap=True)
            self._last_line = now
            self._ended |= {split} if at_end else set()

    def _figures(self, progress: Progress) -> str:
        total = "" if progress.total is None else f"/{progress.total:,}"
        rate = self.rates[progress.split]
        figures = f"{progress.documents:,}{total} documents  {progress.blocks:,} blocks  {rate / 1e6:.3f} M tokens/s"
        if progress.documents == progress.total:
            return f"{figures}  in {duration(progress.seconds)}"
        if progress.total is None or not progress.documents or not rate:
            return figures
        tokens_left = progress.tokens * (progress.total / progress.documents - 1)
        return f"{figures}  {duration(tokens_left / rate)} left"

    def __enter__(self) -> PreparationReport:
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print(OPENING, highlight=False, soft_wrap=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.update(self._opening, visible=False)
        self._bar.stop()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def reading(console: Console, what: str, num_bytes: int | None = None) -> Iterator[Callable[[Shard], None]]:
    """A live bar of bytes on a terminal; gives a function to be called with each shard that was read."""
    bar = Bar(
        TextColumn(what),
        BarColumn(bar_width=30),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(what, total=num_bytes)
    with bar:
        yield lambda shard: bar.update(task, advance=shard.num_bytes)


def show_next(console: Console, command: str) -> None:
    """The command that a user may want to type next, on a line of its own to be copied."""
    say(console, f"\nnext:\n  {command}")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: no markup, no line broken."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
