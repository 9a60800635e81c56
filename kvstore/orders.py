"""Orders: what the service asks the effects to do, as frozen values.

The service decides and records; whoever carries an order out reports back by its id (`Service.finished`,
`Service.advanced`). An order without an id needs no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

from .bypass import Bypass
from .calibration import Calibration, RingRate
from .claims import Pin
from .document import Document
from .errors import HoldfastError
from .extent import Extent, ExtentId
from .geometry import Geometry
from .layout import Layout
from .ledger import Wear
from .prefills import Prefill
from .slots import Slot
from .spec import KVSpec


class Urgency(IntEnum):
    """Transfer classes; lower goes first."""

    ATTACH = 0  # someone waits for the bytes
    DEMOTE = 1  # someone waits for the room
    PREFETCH = 2
    WRITE_THROUGH = 3
    RELIEF = 4  # room that nobody waits for yet
    SCRUB = 5  # an audit, which nobody waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """Compute the plane checksums of a filled DDR slot."""

    id: int
    slot: Slot
    geometry: Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Compare a DDR slot that an earlier daemon filled with its seal; CorruptExtent when a plane differs.

    The seal is the one in the warm index; the outcome passes it on.
    """

    id: int
    extent: ExtentId
    slot: Slot
    geometry: Geometry
    urgency: Urgency


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadIn:
    """NVMe slot to DDR slot, layer by layer; each plane is verified before it counts as read.

    The seal is the one in the extent's catalog row; the outcome passes it on.
    """

    id: int
    extent: ExtentId
    source: Slot
    target: Slot
    geometry: Geometry
    urgency: Urgency


@dataclass(frozen=True, slots=True, kw_only=True)
class Hasten:
    """Somebody waits for these reads by now: what is left of them goes with those of attaches. Never answered."""

    reads: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOut:
    """DDR slot to NVMe slot; finished means synced as far as fdatasync goes."""

    id: int
    source: Slot
    target: Slot
    size_bytes: int
    urgency: Urgency


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrub:
    """Read an NVMe slot again and compare every plane with the seal in its row; the bytes go nowhere."""

    id: int
    extent: ExtentId
    slot: Slot
    geometry: Geometry


class Part(NamedTuple):
    """An extent's place in DDR and in the document, as ranks need it."""

    slot: Slot
    start: int
    valid_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenShard:
    """Tell the ranks of a group which rows a shard takes: `rows[rank]` is its first row there.

    The first `resident_tokens` tokens are there already. `native` is the spec of its extents if they keep an engine's
    pages. `generation` is new with each opening, so that a rank does not take an earlier opening for this one.
    """

    group: str
    shard: int
    generation: int
    layout: Layout
    rows: tuple[int, ...]
    resident_tokens: int
    native: KVSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShard:
    """Layers [layer_start, layer_stop) of these extents from DDR into every rank's rows of the shard."""

    id: int
    group: str
    shard: int
    parts: tuple[Part, ...]
    layer_start: int
    layer_stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveShard:
    """Every rank writes its share of these extents from its arena into their DDR slots."""

    id: int
    group: str
    shard: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseShard:
    """The ranks forget the shard (`reason` empty), or fail whoever waits for its layers."""

    group: str
    shard: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetireSlab:
    """The slab goes to another owner: drop its memory first, so that the new one cannot see old bytes."""

    slab: int


class PutSpec(NamedTuple):
    """Catalog: a model's spec."""

    spec: KVSpec
    kind: Literal["put-spec"] = "put-spec"


class PutExtent(NamedTuple):
    """Catalog: an extent lies, sealed with these checksums, in this NVMe slot."""

    extent: Extent
    checksums: bytes
    slot: Slot
    kind: Literal["put-extent"] = "put-extent"


class DropExtent(NamedTuple):
    """Catalog: the extent's NVMe slot is free."""

    extent: str
    kind: Literal["drop-extent"] = "drop-extent"


class PutDocument(NamedTuple):
    """Catalog: the document is complete on NVMe."""

    document: Document
    kind: Literal["put-document"] = "put-document"


class DropDocument(NamedTuple):
    """Catalog: the document is deleted."""

    tenant: str
    name: str
    kind: Literal["drop-document"] = "drop-document"


class PutPin(NamedTuple):
    """Catalog: a pin, new or replaced."""

    pin: Pin
    kind: Literal["put-pin"] = "put-pin"


class DropPin(NamedTuple):
    """Catalog: a pin ended."""

    tenant: str
    name: str
    kind: Literal["drop-pin"] = "drop-pin"


class PutPrefills(NamedTuple):
    """Catalog: what a model's prefills took, as remembered."""

    fingerprint: bytes
    points: tuple[Prefill, ...]
    kind: Literal["put-prefills"] = "put-prefills"


class PutCalibration(NamedTuple):
    """Catalog: the newest calibration of this machine."""

    calibration: Calibration
    kind: Literal["put-calibration"] = "put-calibration"


class PutRings(NamedTuple):
    """Catalog: what groups were measured to do, in every setting that is remembered, measured last standing last."""

    rates: tuple[RingRate, ...]
    kind: Literal["put-rings"] = "put-rings"


class PutBypass(NamedTuple):
    """Catalog: whether, and why, the cache is bypassed."""

    bypass: Bypass | None
    kind: Literal["put-bypass"] = "put-bypass"


class PutWear(NamedTuple):
    """Catalog: what NVMe had to take so far."""

    wear: Wear
    kind: Literal["put-wear"] = "put-wear"


class PutFence(NamedTuple):
    """Warm index: this process (pid, start time in clock ticks) was given the slab with that serial, as `client`."""

    client: int
    pid: int
    started: int
    serial: int
    kind: Literal["put-fence"] = "put-fence"


class DropFence(NamedTuple):
    """Warm index: the client is gone, or looks at nothing any more."""

    client: int
    kind: Literal["drop-fence"] = "drop-fence"


Record = (
    PutWear
    | PutBypass
    | PutCalibration
    | PutRings
    | PutPrefills
    | PutSpec
    | PutExtent
    | DropExtent
    | PutDocument
    | DropDocument
    | PutPin
    | DropPin
    | PutFence
    | DropFence
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Commit catalog records, in order and together."""

    id: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Tell the warm index what has changed in DDR; never answered.

    A note may be late or lost with the process: whatever the index says of bytes is verified before it counts.
    """

    records: tuple[Record, ...]


MoverOrder = Seal | Verify | ReadIn | Hasten | WriteOut | Scrub | RetireSlab | Write
RankOrder = OpenShard | LoadShard | SaveShard | CloseShard
Order = MoverOrder | RankOrder | Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an order ended. `error` None means done; `busy_ns` is time spent moving bytes, summed over workers."""

    elapsed_ns: int = 0
    busy_ns: int = 0
    size_bytes: int = 0
    error: HoldfastError | None = None
    checksums: bytes = b""


class Effects(Protocol):
    """Carries orders out, later and elsewhere; must not call back into the service from `submit`."""

    def submit(self, order: Order) -> None:
        """Take the order."""
        ...
