"""Decode over sharded KV: attend locally, gather (out, lse), merge.

One all-gather beats an N-step ring here (the paper's table 8: SendRecv 105.7 us against 14.7 us of
attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .communicator import Communicator
from .kernels.kernel import Kernel
from .merge import Partial, merge
from .packed import PackedQueries
from .share import SequenceShare, value_dim_of


def decode(
    communicator: Communicator,
    kernel: Kernel,
    query: Tensor,
    batch: Sequence[SequenceShare],
    window: int | None = None,
) -> Tensor:
    """Attention of query [H, B, D], one token of each of B sequences, over all ranks' KV: float32 [H, B, Dv].

    The query is equal on all ranks, and `queries` of each share name its one position on each.
    Partials merge in rank order, so all ranks compute identical bits. Raises ConfigError, GroupFailed.
    """
    rank = communicator.rank
    queries = PackedQueries(kernel, query, [share.positions(rank) for share in batch], value_dim_of(batch), window)
    queries.attend([share.segments for share in batch])
    local = queries.result()
    if communicator.size == 1:
        return local.out
    packed = torch.cat([local.out, local.lse.unsqueeze(-1)], dim=-1)
    gathered = communicator.all_gather(packed)
    return merge([Partial(part[..., :-1], part[..., -1]) for part in gathered]).out
