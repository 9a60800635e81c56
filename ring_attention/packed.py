"""PackedQueries: the queries of all sequences of a batch in one tensor.

Shapes: H query heads, T query tokens of all sequences, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .attend import attend_segment
from .band import causal
from .kernels.kernel import Kernel
from .merge import Accumulator
from .positions import Positions
from .segment import KVSegment


class PackedQueries:
    """`query` [H, T, D], sequence after sequence, and what has been merged for it so far."""

    def __init__(
        self, kernel: Kernel, query: Tensor, positions: Sequence[Positions], value_dim: int, window: int | None
    ) -> None:
        """`positions[i]` are those of sequence i's queries, of which a sliding window sees the last `window` keys."""
        assert query.shape[1] == sum(map(len, positions)), "positions name every query"
        self._kernel = kernel
        self._query = query
        self._positions = positions
        self._band = causal(window)
        self.total = Accumulator(query.shape[0], query.shape[1], value_dim, query.device)

    def attend(self, sequences: Sequence[Sequence[KVSegment]]) -> None:
        """Merge what the queries see of some segments of each sequence. Raises ConfigError."""
        start = 0
        for positions, segments in zip(self._positions, sequences, strict=True):
            query = self._query[:, start : start + len(positions)]
            for segment in segments:
                attend_segment(self.total, start, self._kernel, query, positions, segment, self._band)
            start += len(positions)
