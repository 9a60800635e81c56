"""RankConfig: what a driver tells a rank process on its command line."""

from __future__ import annotations

import msgspec


class RankConfig(msgspec.Struct, frozen=True):
    """As JSON. `channel` is the inherited descriptor of the control socket; `init_method` is torch.distributed's."""

    rank: int
    cp: int
    group: str
    tenant: str
    daemon_socket: str
    model: str
    device: str
    threads: int
    rows: int
    init_method: str
    channel: int
    deadline_seconds: float
