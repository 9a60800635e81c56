"""RankConfig: what a driver tells a rank process before anything else."""

from __future__ import annotations

import msgspec


class RankConfig(msgspec.Struct, frozen=True):
    """Rank r of the group is (cp rank r // tp, tp rank r % tp). `init_method` is torch.distributed's.

    `communicator` and `strategy` are "auto", or name one; so does `kernel`, which is empty for the device's own.
    """

    rank: int
    cp: int
    tp: int
    group: str
    tenant: str
    daemon_socket: str
    model: str
    device: str
    threads: int
    rows: int
    init_method: str
    communicator: str
    kernel: str
    strategy: str
    deadline_seconds: float
