"""The only place that reads time. Everything else takes a Clock as an argument."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings: one that never goes back, one that survives a restart."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since an arbitrary point; never decreases. For durations and deadlines."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch. For what is stored and shown."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_ns(self) -> int:
        """See Clock."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """See Clock."""
        return time.time_ns()


class ManualClock:
    """A clock that moves only when told to, for tests and simulation."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self._now_ns = start_ns

    def monotonic_ns(self) -> int:
        """See Clock."""
        return self._now_ns

    def wall_ns(self) -> int:
        """See Clock."""
        return self._now_ns

    def advance(self, duration_ns: int) -> None:
        """Let `duration_ns` pass."""
        assert duration_ns >= 0, "time does not go back"
        self._now_ns += duration_ns
