"""Exact pass-Q attention: KV stays, queries travel, (out, lse) come home (after arXiv 2411.01783, algorithm 3).

Shapes: H query heads, T query tokens of this rank, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..kvstore.layout import Span
from .communicator import Communicator
from .kernels.kernel import Kernel
from .merge import Partial, merge
from .packed import PackedQueries
from .positions import Positions
from .share import SequenceShare, value_dim_of, within_reach

# From so many rows a kv head on, the mean of the sequences, a rank's own queries fill kernel calls by themselves: on a
# CPU 1,024 rows are as quick, each, as all ranks' together. They are attended while the others' come.
OWN_ROWS: Final = 1024


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
    run at 59, 67, 74 and 80 GFLOP/s, which is far more than a ring hides of queries' small messages.
    Where a rank's own queries are enough to fill them, it attends these while the others' come.
    """
    rank, size = communicator.rank, communicator.size
    batch = within_reach(batch, window, size)
    heads, tokens, dim = query.shape
    segments = [share.segments for share in batch]

    def attended(packed: Tensor, positions: Sequence[Positions]) -> Partial:
        queries = PackedQueries(kernel, packed, positions, value_dim_of(batch), window)
        queries.attend(segments)
        return queries.result()

    asking = [share.positions(rank) for share in batch]
    apart = _fill_calls(heads // segments[0][0].key.shape[0], asking)
    travellers = _Travellers(batch, [peer for peer in range(size) if not (apart and peer == rank)], size)
    own = query.transpose(0, 1).contiguous()
    arrived = [own if peer == rank else own.new_empty(travellers.tokens(peer), heads, dim) for peer in range(size)]
    work = communicator.all_to_all([own] * size, arrived)
    stayed = [attended(query, asking)] if apart else []
    work.wait()
    partial = attended(travellers.together(arrived).transpose(0, 1), travellers.positions)
    replies = [travellers.reply(partial, peer, query.dtype) for peer in range(size)]
    home = [
        replies[rank] if peer == rank else _Reply(heads, tokens, value_dim_of(batch), query.dtype, query.device)
        for peer in range(size)
    ]
    communicator.all_to_all([reply.message for reply in replies], [reply.message for reply in home]).wait()
    return merge([*stayed, *(home[peer].partial() for peer in travellers.ranks)]).out


def _fill_calls(group: int, asking: Sequence[Positions]) -> bool:
    """Whether queries of so many heads a kv head fill kernel calls without those of other ranks."""
    asked = [len(positions) for positions in asking if len(positions)]
    return sum(asked) * group >= OWN_ROWS * max(1, len(asked))


class _Travellers:
    """Where the queries of `ranks` are in their packed queries together, which are in order of position.

    So the new tokens of a sequence, dealt over ranks, are one run again, and take few kernel calls.
    """

    def __init__(self, batch: Sequence[SequenceShare], ranks: Sequence[int], size: int) -> None:
        self.ranks = ranks
        self.positions: list[Positions] = []
        # By rank, in the order of its own queries: their rows there; and all pieces in packed order.
        self._rows: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        self._pieces: list[tuple[int, int, int]] = []  # (rank, start, stop) of rows there
        row, lengths = 0, [0] * size
        for share in batch:
            spans = sorted((span.start, span.stop, rank) for rank in ranks for span in share.queries[rank])
            for start, stop, rank in spans:
                count = stop - start
                self._rows[rank].append((row, row + count))
                self._pieces.append((rank, lengths[rank], lengths[rank] + count))
                lengths[rank] += count
                row += count
            self.positions.append(Positions([Span(start, stop) for start, stop, _ in spans]))
        self._lengths = lengths

    def tokens(self, rank: int) -> int:
        """Queries of a rank; 0 of one that is not among `ranks`."""
        return self._lengths[rank]

    def together(self, arrived: Sequence[Tensor]) -> Tensor:
        """Their rows, in order of position."""
        pieces = [arrived[rank][start:stop] for rank, start, stop in self._pieces]
        return torch.cat(pieces) if pieces else arrived[0][:0]

    def reply(self, partial: Partial, rank: int, dtype: torch.dtype) -> _Reply:
        """A rank's part of what was computed for all of them, in its own order."""
        heads, _, value_dim = partial.out.shape
        reply = _Reply(heads, self.tokens(rank), value_dim, dtype, partial.out.device)
        done = 0
        for start, stop in self._rows[rank]:
            rows = slice(done, done + stop - start)
            reply.out[rows] = partial.out[:, start:stop].transpose(0, 1)
            reply.lse[rows] = partial.lse[:, start:stop].transpose(0, 1)
            done = rows.stop
        return reply


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
