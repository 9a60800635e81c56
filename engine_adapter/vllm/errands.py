"""Errands: what nobody waits for, done in order on a thread; dropped while too much waits."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

WAITING_MAX: Final = 256
STOP_SECONDS: Final = 5.0


class Errands:
    """A bounded queue and its thread. Its methods belong to one thread, the scheduler's."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING_MAX + 1)  # room for the end
        self._thread = threading.Thread(target=self._serve, name="holdfast-errands", daemon=True)
        self._thread.start()

    def run(self, errand: Callable[[], object]) -> bool:
        """Have it done some time; False when too much waits already."""
        if self._waiting.qsize() >= WAITING_MAX:
            return False
        self._waiting.put_nowait(errand)
        return True

    def close(self) -> None:
        """Do what waits, as far as that takes seconds only."""
        self._waiting.put_nowait(None)
        self._thread.join(STOP_SECONDS)

    def _serve(self) -> None:
        while (errand := self._waiting.get()) is not None:
            try:
                errand()
            except Exception:
                log.exception("an errand failed")
