"""Positions: where the tokens of a packed tensor stand in their sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..kvstore.layout import Span


class Positions:
    """The positions of packed tokens, ascending. Index i is the i-th token; a run is what has no gap in it."""

    def __init__(self, spans: Sequence[Span]) -> None:
        """`spans` ascend and do not overlap; their rows are not read."""
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

    def tensor(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The positions [start, stop) as int64."""
        parts = []
        for span, offset in zip(self._spans, self._offsets, strict=False):
            low, high = max(start, offset), min(stop, offset + span.stop - span.start)
            if low < high:
                parts.append(torch.arange(span.start + low - offset, span.start + high - offset, device=device))
        return torch.cat(parts)


def _start(span: Span) -> int:
    return span.start
