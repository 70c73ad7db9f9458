"""What a preparation shows on the terminal while it goes on."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from imdm_scale.data.prepare import Progress

LINE_SECONDS = 10.0
"""Least time between two lines where the output is no terminal."""


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
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
