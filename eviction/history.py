"""History: who was used how often, remembered beyond eviction and bounded in size."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class _Trace:
    """Decayed count as of the last access, and when that was."""

    count: float
    last_access_ns: int


class History:
    """Exponentially decayed counts of uses, for residents and for ghosts (what has left).

    A use counts 1 now, 1/2 after `half_life_ns`, 1/4 after two. Holds at most `capacity` ids and
    drops the one touched longest ago; the order is that of the calls, so it is deterministic. An
    access earlier than the last one (clocks of two processes) counts as one at the same time.
    """

    def __init__(self, capacity: int, half_life_ns: int) -> None:
        assert capacity > 0, capacity
        assert half_life_ns > 0, half_life_ns
        self._capacity = capacity
        self._half_life_ns = half_life_ns
        self._traces: OrderedDict[str, _Trace] = OrderedDict()  # oldest touch first

    def __len__(self) -> int:
        return len(self._traces)

    def touch(self, candidate_id: str, now_ns: int) -> None:
        """Record one use."""
        trace = self._traces.get(candidate_id)
        if trace is None:
            self._traces[candidate_id] = _Trace(1.0, now_ns)
            if len(self._traces) > self._capacity:
                self._traces.popitem(last=False)
            return
        trace.count = 1.0 + self._decayed(trace, now_ns)
        trace.last_access_ns = max(trace.last_access_ns, now_ns)
        self._traces.move_to_end(candidate_id)

    def frequency(self, candidate_id: str, now_ns: int) -> float:
        """Decayed count of uses, 0.0 for an id it does not know. Looking changes nothing."""
        trace = self._traces.get(candidate_id)
        return 0.0 if trace is None else self._decayed(trace, now_ns)

    def last_access_ns(self, candidate_id: str) -> int | None:
        """When it was last touched, None for an id it does not know."""
        trace = self._traces.get(candidate_id)
        return None if trace is None else trace.last_access_ns

    def forget(self, candidate_id: str) -> None:
        """Drop what is known of an id; nothing happens when that is nothing."""
        self._traces.pop(candidate_id, None)

    def _decayed(self, trace: _Trace, now_ns: int) -> float:
        idle_ns = max(0, now_ns - trace.last_access_ns)
        return trace.count * math.exp2(-idle_ns / self._half_life_ns)
