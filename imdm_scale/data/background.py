"""Work that is done ahead, in the background."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)


class Background:
    """Calls functions in order in a thread, which is there while there is something to do.

    It is a daemon: it never keeps a process from ending.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = False

    def replace(self, calls: Sequence[Callable[[], None]]) -> None:
        """Puts `calls` in the place of all that were not begun."""
        with self._lock:
            self._waiting = deque(calls)
            if self._waiting and not self._running:
                self._running = True
                threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                call = self._waiting.popleft()
            try:
                call()
            except Exception as error:
                logger.warning("Fetching ahead failed, and is tried again when it is needed: %s", error)
