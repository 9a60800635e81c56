"""All-gather attention, the plain baseline: first everyone gets everyone's KV, then attends to it alone.

Shapes: H query heads, T query tokens of this rank, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .communicator import Communicator
from .kernels.kernel import Kernel
from .kv_message import KVMessages
from .packed import PackedQueries
from .share import SequenceShare, value_dim_of, within_reach


def all_gather(
    communicator: Communicator,
    kernel: Kernel,
    query: Tensor,
    batch: Sequence[SequenceShare],
    window: int | None = None,
) -> Tensor:
    """What `pass_kv` computes, with nothing to hide the transfer, and memory for all ranks' KV of the layer."""
    rank, ranks = communicator.rank, range(communicator.size)
    batch = within_reach(batch, window, communicator.size)
    messages = KVMessages(batch)
    own = messages.pack()
    gathered = [own if peer == rank else messages.empty(messages.elements(peer)) for peer in ranks]
    communicator.all_to_all([own] * communicator.size, gathered).wait()
    queries = PackedQueries(kernel, query, [share.positions(rank) for share in batch], value_dim_of(batch), window)
    for peer, message in enumerate(gathered):
        queries.attend(messages.unpack(message, peer))
    return queries.result().out
