"""Reports: what workers tell, on its way to the service's thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from .orders import Outcome
from .service import Service

REPORTS_MAX: Final = 64  # in one turn of the loop


class Reports:
    """Brings what workers report to the loop's thread; one wake-up of the loop brings all that has gathered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, crashed: Callable[[BaseException], None]) -> None:
        self._loop = loop
        self._crashed = crashed
        self._gathered: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._is_called = False  # written without a lock: at worst the loop is woken twice
        self.service: Service | None = None

    def finished(self, order_id: int, outcome: Outcome) -> None:
        """See mover.Report."""
        self._later(self._finished, order_id, outcome)

    def advanced(self, order_id: int, layers: int) -> None:
        """See mover.Report."""
        self._later(self._advanced, order_id, layers)

    def crashed(self, error: Exception) -> None:
        """See mover.Report."""
        self._later(self._crashed, error)

    def _later(self, call: Callable[..., None], *arguments: object) -> None:
        self._gathered.append((call, arguments))
        if not self._is_called:
            self._call()

    def _call(self) -> None:
        self._is_called = True
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Tell the service; what comes from now on calls again. Others have their turn between many reports."""
        self._is_called = False
        try:
            for _ in range(min(len(self._gathered), REPORTS_MAX)):
                call, arguments = self._gathered.popleft()
                call(*arguments)
        finally:
            if self._gathered:
                self._call()

    def _finished(self, order_id: int, outcome: Outcome) -> None:
        assert self.service is not None
        self.service.finished(order_id, outcome)

    def _advanced(self, order_id: int, layers: int) -> None:
        assert self.service is not None
        self.service.advanced(order_id, layers)
