"""PackedQueries: the queries of all sequences of a batch in one tensor.

Shapes: H query heads, T query tokens of all sequences, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attend import attend_segment
from .band import causal
from .kernels.kernel import Kernel
from .merge import Accumulator, Partial
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
        # One for each sequence: a lone part of it, as decode makes them, is then never merged into anything.
        self._totals = [Accumulator(query.shape[0], len(one), value_dim, query.device) for one in positions]

    def attend(self, sequences: Sequence[Sequence[KVSegment]]) -> None:
        """Merge what the queries see of some segments of each sequence. Raises ConfigError."""
        start = 0
        for total, positions, segments in zip(self._totals, self._positions, sequences, strict=True):
            query = self._query[:, start : start + len(positions)]
            for segment in segments:
                attend_segment(total, 0, self._kernel, query, positions, segment, self._band)
            start += len(positions)

    def result(self) -> Partial:
        """The merge so far, packed as the queries are."""
        parts = [total.result() for total in self._totals]
        if len(parts) == 1:
            return parts[0]
        # Tokens stay before heads in memory.
        out, lse = (
            torch.cat([part.transpose(0, 1) for part in some]).transpose(0, 1)
            for some in ([part.out for part in parts], [part.lse for part in parts])
        )
        return Partial(out, lse)
