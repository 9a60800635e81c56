"""Sections: what can be configured, as frozen values.

Keys without a default here get one in `config`, from other keys or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from .allowed import AUTO, Fraction, PathOrAuto, PathText, Seconds, Size, Text, Whole
from .sizes import GIB, KIB, MIB, TIB

OTHERS: Final = "*"  # the table of tenants that have none of their own
OFF: Final = "off"
PAGE_BYTES: Final = 4096  # slots are read and written directly, in whole pages


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """The process: where it keeps its state and how it is reached. Port 0 is any free port."""

    data_dir: Annotated[Path, PathText()]
    socket: Annotated[Path, PathText()]
    rest_host: Annotated[str, Text()] = "127.0.0.1"
    rest_port: Annotated[int, Whole(0, 65535)] = 8470
    log_level: Annotated[str, Text(("debug", "info", "warning", "error"))] = "info"
    drain_seconds: Annotated[float, Seconds(0, 3600)] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DdrConfig:
    """The DDR tier: shared-memory slabs, all made at start; a clean stop leaves or frees them, as `on_stop` says.

    What is larger passes through in windows of `window_bytes`. When more than the part `high_watermark` of it is used,
    it is freed down to `low_watermark` beside everything else; 1.0 is never.
    """

    capacity_bytes: Annotated[int, Size(MIB)]
    slab_bytes: Annotated[int, Size(64 * KIB, 64 * GIB, PAGE_BYTES)] = 64 * MIB
    window_bytes: Annotated[int, Size(0)]
    high_watermark: Annotated[float, Fraction()] = 0.95
    low_watermark: Annotated[float, Fraction()] = 0.9
    directory: Annotated[Path | Literal["auto"], PathOrAuto()] = AUTO
    on_stop: Annotated[str, Text(("keep", "free"))] = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeConfig:
    """The NVMe tier: preallocated segment files, read and written by `threads`.

    `backlog_bytes` bounds what waits to be written through; `when_behind` says what happens to a document beyond that:
    it stays in "memory" until the disk has caught up, or its commit has to "wait". Watermarks are as those of DDR.
    """

    capacity_bytes: Annotated[int, Size(MIB)] = 4 * GIB
    high_watermark: Annotated[float, Fraction()] = 0.98
    low_watermark: Annotated[float, Fraction()] = 0.96
    segment_bytes: Annotated[int, Size(64 * KIB, TIB, PAGE_BYTES)] = 256 * MIB
    directory: Annotated[Path, PathText()]
    threads: Annotated[int, Whole(1, 64)] = 6
    backlog_bytes: Annotated[int, Size(0)]
    when_behind: Annotated[str, Text(("memory", "wait"))] = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionConfig:
    """Who leaves. The daemon knows which policies there are; ghosts are extents that were here."""

    policy: Annotated[str, Text()] = "popularity"
    ghost_entries: Annotated[int, Whole(1, 100_000_000)] = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsConfig:
    """KV events over ZeroMQ, for routers (see kv_events): where they are published and replayed, and how many are kept.

    The topic "off" is the empty one.
    """

    endpoint: Annotated[str, Text()] = OFF
    replay_endpoint: Annotated[str, Text()] = OFF
    topic: Annotated[str, Text()] = OFF
    buffer_batches: Annotated[int, Whole(1, 1_000_000)] = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """A limit on everything that can grow."""

    frame_bytes: Annotated[int, Size(64 * KIB, GIB)] = 16 * MIB
    connections: Annotated[int, Whole(1, 65_536)] = 256
    requests_per_connection: Annotated[int, Whole(1, 65_536)] = 64
    lease_seconds: Annotated[float, Seconds(0.001, 86_400)] = 300.0
    pin_bytes: Annotated[int, Size(0)]
    ddr_pin_bytes: Annotated[int, Size(0)]
    pending_reservations: Annotated[int, Whole(1, 1_000_000)] = 256
    swap_records: Annotated[int, Whole(1, 10_000_000)] = 1000
    documents: Annotated[int, Whole(1, 100_000_000)] = 100_000
    unnamed: Annotated[int, Whole(1, 100_000_000)] = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """What one tenant may have, or (under the name "*") each tenant that has no table of its own.

    Up to `guaranteed` bytes are never taken for another tenant's demand; beyond `maximum` its new bytes come out of its
    own. Pins beyond `pin` bytes are refused (every pin counts on NVMe, those at DDR or HBM in DDR too), and so are
    leases in DDR beyond `lease` bytes. None is no limit.
    """

    ddr_guaranteed_bytes: Annotated[int, Size(0)] = 0
    ddr_maximum_bytes: Annotated[int | None, Size(0)] = None
    nvme_guaranteed_bytes: Annotated[int, Size(0)] = 0
    nvme_maximum_bytes: Annotated[int | None, Size(0)] = None
    ddr_pin_bytes: Annotated[int | None, Size(0)] = None
    nvme_pin_bytes: Annotated[int | None, Size(0)] = None
    ddr_lease_bytes: Annotated[int | None, Size(0)] = None
