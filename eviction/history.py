"""History: who was used how often, remembered beyond eviction and bounded in size."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

UNCOUNTED_MAX: Final = 256  # sets of uses that wait to be counted


@dataclass(slots=True)
class _Trace:
    """Decayed count as of the last access, and when that was."""

    count: float
    last_access_ns: int


@dataclass(slots=True)
class _Uses:
    """Uses of the same ids together, not counted yet: their decayed number as of the last, and when that was."""

    ids: Sequence[str]
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
        self._uncounted: dict[int, _Uses] = {}  # by the identity of the sequence; oldest touch first

    def __len__(self) -> int:
        self._count_all()
        return len(self._traces)

    def touch(self, candidate_id: str, now_ns: int) -> None:
        """Record one use."""
        self._count_all()
        self._count(_Uses((candidate_id,), 1.0, now_ns))

    def touch_all(self, ids: Sequence[str], now_ns: int) -> None:
        """Record one use of each, in this order, as `touch` would. The sequence must not change.

        Counted when somebody looks: until then, using the same sequence again costs no more than one id does.
        """
        uses = self._uncounted.pop(id(ids), None)
        if uses is None:
            uses = _Uses(ids, 1.0, now_ns)
        else:
            uses.count = 1.0 + self._decayed(uses, now_ns)
            uses.last_access_ns = max(uses.last_access_ns, now_ns)
        self._uncounted[id(ids)] = uses
        if len(self._uncounted) > UNCOUNTED_MAX:
            self._count(self._uncounted.pop(next(iter(self._uncounted))))

    def _count_all(self) -> None:
        if self._uncounted:
            uncounted, self._uncounted = self._uncounted, {}
            for uses in uncounted.values():
                self._count(uses)

    def _count(self, uses: _Uses) -> None:
        for candidate_id in uses.ids:
            trace = self._traces.get(candidate_id)
            if trace is None:
                self._traces[candidate_id] = _Trace(uses.count, uses.last_access_ns)
                if len(self._traces) > self._capacity:
                    self._traces.popitem(last=False)
                continue
            trace.count = uses.count + self._decayed(trace, uses.last_access_ns)
            trace.last_access_ns = max(trace.last_access_ns, uses.last_access_ns)
            self._traces.move_to_end(candidate_id)

    def frequency(self, candidate_id: str, now_ns: int) -> float:
        """Decayed count of uses, 0.0 for an id it does not know. Looking changes nothing."""
        self._count_all()
        trace = self._traces.get(candidate_id)
        return 0.0 if trace is None else self._decayed(trace, now_ns)

    def last_access_ns(self, candidate_id: str) -> int | None:
        """When it was last touched, None for an id it does not know."""
        self._count_all()
        trace = self._traces.get(candidate_id)
        return None if trace is None else trace.last_access_ns

    def forget(self, candidate_id: str) -> None:
        """Drop what is known of an id; nothing happens when that is nothing."""
        self._count_all()
        self._traces.pop(candidate_id, None)

    def _decayed(self, trace: _Trace | _Uses, now_ns: int) -> float:
        idle_ns = max(0, now_ns - trace.last_access_ns)
        return trace.count * math.exp2(-idle_ns / self._half_life_ns)
