"""Exact pass-Q attention: KV stays, queries travel, (out, lse) come home (after arXiv 2411.01783, algorithm 3).

Shapes: H query heads, T query tokens of this rank, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kvstore.layout import Span
from .communicator import Communicator
from .kernels.kernel import Kernel
from .merge import Partial, merge
from .packed import PackedQueries
from .positions import Positions
from .share import SequenceShare, value_dim_of, within_reach


def pass_q(
    communicator: Communicator,
    kernel: Kernel,
    query: Tensor,
    batch: Sequence[SequenceShare],
    window: int | None = None,
) -> Tensor:
    """What `pass_kv` computes. Partial results travel in the query's dtype if that is half precision, else in float32.

    Everyone gets everyone's queries at once, not by a ring, because one call for all of them reads
    this rank's KV once and fills the kernel's blocks: on a CPU 128, 256, 640 and 1,280 rows a kv head
    run at 51, 64, 62 and 79 GFLOP/s, which is far more than a ring hides of queries' small messages.
    """
    rank, ranks = communicator.rank, range(communicator.size)
    batch = within_reach(batch, window, communicator.size)
    heads, _, dim = query.shape
    value_dim = value_dim_of(batch)
    travellers = _Travellers(batch, communicator.size)
    own = query.transpose(0, 1).contiguous()
    arrived = [own if peer == rank else own.new_empty(travellers.tokens(peer), heads, dim) for peer in ranks]
    communicator.all_to_all([own] * communicator.size, arrived).wait()
    together = travellers.together(arrived).transpose(0, 1)
    queries = PackedQueries(kernel, together, travellers.positions, value_dim, window)
    queries.attend([share.segments for share in batch])
    partial = queries.total.result()
    replies = [_Reply(heads, travellers.tokens(peer), value_dim, query.dtype, query.device) for peer in ranks]
    for peer, reply in enumerate(replies):
        travellers.part(partial.out.transpose(0, 1), peer, reply.out)
        travellers.part(partial.lse.transpose(0, 1), peer, reply.lse)
    home = [
        replies[rank] if peer == rank else _Reply(heads, own.shape[0], value_dim, query.dtype, query.device)
        for peer in ranks
    ]
    communicator.all_to_all([reply.message for reply in replies], [reply.message for reply in home]).wait()
    return merge([reply.partial() for reply in home]).out


class _Travellers:
    """Where every rank's queries are in the packed queries of all ranks, which are in order of position.

    So the new tokens of a sequence, dealt over ranks, are one run again, and take few kernel calls.
    """

    def __init__(self, batch: Sequence[SequenceShare], ranks: int) -> None:
        self.positions: list[Positions] = []
        # By rank, in the order of its own queries: their rows there; and all pieces in packed order.
        self._rows: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        self._pieces: list[tuple[int, int, int]] = []  # (rank, start, stop) of rows there
        row, lengths = 0, [0] * ranks
        for share in batch:
            spans = sorted((span.start, span.stop, rank) for rank in range(ranks) for span in share.queries[rank])
            for start, stop, rank in spans:
                count = stop - start
                self._rows[rank].append((row, row + count))
                self._pieces.append((rank, lengths[rank], lengths[rank] + count))
                lengths[rank] += count
                row += count
            self.positions.append(Positions([Span(start, stop) for start, stop, _ in spans]))
        self._lengths = lengths

    def tokens(self, rank: int) -> int:
        """Queries of a rank."""
        return self._lengths[rank]

    def together(self, arrived: Sequence[Tensor]) -> Tensor:
        """All ranks' rows, in order of position."""
        pieces = [arrived[rank][start:stop] for rank, start, stop in self._pieces]
        return torch.cat(pieces) if pieces else arrived[0]

    def part(self, rows: Tensor, rank: int, out: Tensor) -> None:
        """Copy a rank's rows of `rows`, in its own order, to `out`."""
        done = 0
        for start, stop in self._rows[rank]:
            out[done : done + stop - start] = rows[start:stop]
            done += stop - start


class _Reply:
    """(out, lse) of a rank's queries as one message: `lse` float32 [T, H], then `out` [T, H, Dv]."""

    def __init__(self, heads: int, tokens: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        dtype = dtype if dtype.itemsize == 2 else torch.float32
        lse_bytes = 4 * heads * tokens
        out_bytes = heads * tokens * value_dim * dtype.itemsize
        self.message = torch.empty(lse_bytes + out_bytes, dtype=torch.uint8, device=device)
        self.lse = self.message[:lse_bytes].view(torch.float32).view(tokens, heads)
        self.out = self.message[lse_bytes:].view(dtype).view(tokens, heads, value_dim)

    def partial(self) -> Partial:
        """As it is merged."""
        return Partial(self.out.transpose(0, 1).float(), self.lse.transpose(0, 1))
