"""What tools/generate_pairs.py shows on the terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from imdm_scale.data.prepare_console import LINE_SECONDS, duration


class PairReport:
    """A live bar on a terminal; a line now and then elsewhere. A context manager.

    Args:
        there: pairs that were made before.
        total: pairs of this program's part, those among them.
    """

    def __init__(self, console: Console, there: int, total: int) -> None:
        self._console, self._done, self._total = console, there, total
        self._made = 0
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("pairs"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("pairs", total=total, completed=there, figures="")

    def add(self, count: int, made: bool = True) -> None:
        """So many pairs more are done; `made` by this program or, which says nothing of its rate, by another."""
        self._done += count
        self._made += count if made else 0
        now = time.monotonic()
        rate = self._made / max(now - self._started, 1e-9)
        left = f"  {duration((self._total - self._done) / rate)} left" if rate else ""
        figures = f"{rate:.3g} pairs/s{left}"
        self._bar.update(self._task, completed=self._done, figures=figures)
        at_end = self._done == self._total
        if not self._console.is_terminal and (at_end or now - self._last_line >= LINE_SECONDS):
            line = f"pairs  {self._done:,}/{self._total:,}  {figures}"
            self._console.print(line, highlight=False, soft_wrap=True)
            self._last_line = now

    def __enter__(self) -> PairReport:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
