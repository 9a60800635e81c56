"""Forward: one pass of the model over the packed new tokens of a batch, on one rank.

Shapes: T new tokens of this rank, all sequences packed in batch order; E hidden size, H query heads and Hkv kv heads
of this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kvstore.layout import Span
from .choice import LOCAL, PASS_KV
from .decode import decode
from .grid import Grid
from .kernels.kernel import Kernel
from .model import Decoder
from .segment import span_tokens
from .sequence import Placed
from .strategies import STRATEGIES, Strategy

Ids = npt.NDArray[np.int64]


class Forward:
    """What a rank needs for a pass; holds nothing between passes."""

    def __init__(self, model: Decoder, grid: Grid, kernel: Kernel) -> None:
        self.model = model
        self.grid = grid
        self._kernel = kernel

    def chunk(self, strategy: str, batch: Sequence[Placed], tokens: Sequence[Ids]) -> Tensor:
        """Hidden states [T, E] of this rank's share of new chunks; `tokens` are whole chunks, in batch order."""
        rank = self.grid.cp.rank
        local = [_share(placed, ids, rank) for placed, ids in zip(batch, tokens, strict=True)]
        return self._run(STRATEGIES[PASS_KV if strategy == LOCAL else strategy], batch, np.concatenate(local))

    def token(self, batch: Sequence[Placed], tokens: Sequence[int]) -> Tensor:
        """Hidden states [B, E], the same bits on all ranks, of one new token of each sequence."""
        return self._run(decode, batch, np.array(tokens, dtype=np.int64))

    def states(self, count: int) -> Tensor:
        """Uninitialised hidden states [count, E]."""
        config = self.model.config
        return torch.empty(count, config.hidden_size, dtype=getattr(torch, config.dtype), device=self.model.device)

    def cuts(self, batch: Sequence[Placed]) -> list[int]:
        """Where each sequence's share begins and ends among the packed tokens."""
        rank = self.grid.cp.rank
        return [0, *accumulate(span_tokens(placed.queries[rank]) for placed in batch)]

    def _run(self, strategy: Strategy, batch: Sequence[Placed], ids: Ids) -> Tensor:
        model, grid, windows = self.model, self.grid, self.model.config.windows
        cuts = list(pairwise(self.cuts(batch)))

        def attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            for placed, (start, stop) in zip(batch, cuts, strict=True):
                placed.store(layer, key[:, start:stop], value[:, start:stop])
            shares = [placed.share(layer, windows[layer]) for placed in batch]
            return strategy(grid.cp, self._kernel, query, shares, windows[layer])

        positions = _positions([span for placed in batch for span in placed.queries[grid.cp.rank]])
        return model.hidden(self._tensor(ids), self._tensor(positions), attention, grid.reduce)

    def _tensor(self, numbers: Ids) -> Tensor:
        return torch.from_numpy(numbers).to(self.model.device)


def _share(placed: Placed, chunk: Ids, rank: int) -> Ids:
    """The ids of a chunk that this rank computes."""
    first = placed.first_token
    return np.concatenate(
        [chunk[:0], *(chunk[span.start - first : span.stop - first] for span in placed.queries[rank])]
    )


def _positions(spans: Sequence[Span]) -> Ids:
    return np.concatenate(
        [np.arange(span.start, span.stop, dtype=np.int64) for span in spans] or [np.empty(0, np.int64)]
    )
