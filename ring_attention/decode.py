"""Decode over sharded KV: attend locally, gather (out, lse), merge.

One all-gather beats an N-step ring here (the paper's table 8: SendRecv 105.7 us against 14.7 us of
attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attend import attend_segment
from .band import causal
from .communicator import Communicator
from .kernels.kernel import Kernel
from .merge import Accumulator, Partial, merge
from .positions import Positions
from .share import SequenceShare


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
    heads, sequences, _ = query.shape
    assert sequences == len(batch), "one query for each sequence"
    total = Accumulator(heads, sequences, batch[0].segments[0].value.shape[2], query.device)
    for index, share in enumerate(batch):
        position = Positions(share.queries[communicator.rank])
        for segment in share.segments:
            attend_segment(total, index, kernel, query[:, index : index + 1], position, segment, causal(window))
    local = total.result()
    if communicator.size == 1:
        return local.out
    packed = torch.cat([local.out, local.lse.unsqueeze(-1)], dim=-1)
    gathered = communicator.all_gather(packed)
    return merge([Partial(part[..., :-1], part[..., -1]) for part in gathered]).out
