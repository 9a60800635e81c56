"""Positions: where the tokens of a packed tensor stand in their sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from threading import Lock
from typing import Final

import torch
from torch import Tensor

from ..kvstore.layout import Span

SPANS_KEPT: Final = 1 << 20  # some 200 bytes each: four documents of the finest layout that there may be
ENTRY_SPANS: Final = 64  # what a tuple takes beside its spans


class Positions:
    """The positions of packed tokens, ascending. Index i is the i-th token; a run is what has no gap in it."""

    def __init__(self, spans: Sequence[Span]) -> None:
        """`spans` ascend and do not overlap; their rows are not read. See `positions_of`."""
        self._spans = spans = [span for span in spans if span.start < span.stop]
        self._offsets = [0, *accumulate(span.stop - span.start for span in spans)]

    def __len__(self) -> int:
        return self._offsets[-1]

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < len(self), (index, len(self))
        number = bisect_right(self._offsets, index) - 1
        return self._spans[number].start + index - self._offsets[number]

    def before(self, position: int) -> int:
        """How many tokens, a prefix, stand before `position`."""
        number = bisect_right(self._spans, position, key=_start) - 1
        if number < 0:
            return 0
        span = self._spans[number]
        return self._offsets[number] + min(position, span.stop) - span.start

    def is_run(self, start: int, stop: int) -> bool:
        """Whether the tokens [start, stop), at least one, follow each other without a gap."""
        return self[stop - 1] - self[start] == stop - 1 - start

    def middle(self, start: int, stop: int) -> int:
        """Where to cut [start, stop), at least two tokens: at the gap nearest to the middle, if there is one."""
        half = (start + stop) // 2
        number = bisect_right(self._offsets, half)
        gaps = [gap for gap in self._offsets[number - 1 : number + 1] if start < gap < stop]
        return min(gaps, key=lambda gap: abs(gap - half), default=half)

    def cut(self, start: int, stop: int) -> tuple[Span, ...]:
        """The spans of the tokens [start, stop)."""
        if start >= stop:
            return ()
        first, last = bisect_right(self._offsets, start) - 1, bisect_right(self._offsets, stop - 1) - 1
        spans = self._spans[first : last + 1]
        spans[-1] = replace(spans[-1], stop=self[stop - 1] + 1)
        skipped = start - self._offsets[first]
        spans[0] = Span(spans[0].start + skipped, spans[0].stop, spans[0].row + skipped)
        return tuple(spans)

    def tensor(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The positions [start, stop) as int64."""
        spans = self.cut(start, stop)
        lengths = torch.tensor([span.stop - span.start for span in spans])
        ends = torch.tensor([span.stop for span in spans])
        behind = (ends - lengths.cumsum(0)).repeat_interleave(lengths)  # of a token's index, its position
        return (torch.arange(len(behind)) + behind).to(device)


class KeptPositions:
    """Positions by the identity of their spans: comparing thousands of spans would cost what keeping them saves.

    Those used last, and no more than bounded memory: a tail that decode dealt over ranks has a span for each token.
    """

    def __init__(self, limit: int) -> None:
        """At most `limit` spans in all, counting ENTRY_SPANS more for each tuple."""
        self._left = limit
        self._lock = Lock()
        # A tuple that is kept keeps its id to itself.
        self._entries: OrderedDict[int, tuple[tuple[Span, ...], Positions]] = OrderedDict()

    def of(self, spans: tuple[Span, ...]) -> Positions:
        """Made at most once, as long as they are kept."""
        with self._lock:
            found = self._entries.get(id(spans))
            if found is None:
                found = self._entries[id(spans)] = (spans, Positions(spans))
                self._left -= len(spans) + ENTRY_SPANS
            self._entries.move_to_end(id(spans))
            while self._left < 0 and len(self._entries) > 1:
                _, (dropped, _) = self._entries.popitem(last=False)
                self._left += len(dropped) + ENTRY_SPANS
        return found[1]


_KEPT: Final = KeptPositions(SPANS_KEPT)


def positions_of(spans: Sequence[Span]) -> Positions:
    """The positions of `spans`, kept for a while: every layer of a model asks for the same tuples again."""
    return _KEPT.of(tuple(spans))


def _start(span: Span) -> int:
    return span.start
