"""Wire: the messages between the daemon and engines (frames puts them on a socket).

Bodies are tagged arrays, so any msgpack reader decodes them. KV bytes never travel here: they lie in shared slabs,
whose descriptors are sent beside a SlabsMapped reply.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from .calibration import RingRate, RingSetting
from .claim_messages import ListPins, PinDocument, Pinned, Pins, UnpinDocument, UnpinDocuments
from .document import WritePolicy
from .explain_wire import ExplainDocument, Explained
from .hint_wire import CancelPrefetch, Hinted, PrefetchDocument
from .holders import Holder
from .layouts import LayoutMessage, ShardMessage
from .message import Count, Line, Message, Nanoseconds, Seconds, Size
from .model_messages import Cleared, ClearModel
from .object_messages import ObjectReply, ObjectRequest
from .prefix_wire import AttachPrefix, ExtraParts, Found, Keys, KeysOf, Lookup, LookupTokens
from .runs import Parts, RunMessage
from .spec import KVSpec
from .views import DocumentView, SwapView, TierView, VictimView

PROTOCOL_VERSION: Final = 2
SLABS_AT_ONCE: Final = 128  # a message carries at most 253 descriptors

# Requests ------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a connection. `resume`: earlier client numbers of this process that hold nothing any more."""

    version: int
    tenant: str
    resume: list[int] = msgspec.field(default_factory=list)


class Goodbye(Message, frozen=True):
    """The client lets go of everything and leaves."""


class RegisterSpec(Message, frozen=True):
    """Make a model known."""

    spec: KVSpec


class RegisterRank(Message, frozen=True):
    """This connection is one rank of a group, with an HBM arena; what it computes with was chosen at its start."""

    group: str
    rank: Count
    cp: Count
    tp: Count
    fingerprint: bytes
    rows: Count
    kernel: Line = ""
    communicator: Line = ""
    device: Line = ""


class BeginIngest(Message, frozen=True):
    """Open an ingest. `tokens` are little-endian uint32.

    `layout`: who is to have which tokens in the group; by default zigzag chunks behind what is cached. `ttl_seconds`:
    the document is deleted so long after it is published; by default never, or when a document of that name would be.
    """

    name: str
    fingerprint: bytes
    tokens: bytes
    write_policy: WritePolicy
    group: str | None
    chunk_tokens: Count
    deadline_seconds: float
    layout: LayoutMessage | None = None
    ttl_seconds: float | None = None
    extras: ExtraParts = msgspec.field(default_factory=list)


class CommitIngest(Message, frozen=True):
    """Publish an ingest. `seals`: none, or one per extent of IngestOpened; the daemon makes those that are empty."""

    ingest: int
    seals: list[bytes] = msgspec.field(default_factory=list)
    deadline_seconds: float = 600.0


class NextSlots(Message, frozen=True):
    """Hand over filled extents, each as (first token, layer group), and ask for the slots that they make free.

    `seals`: none, or one each. For documents that do not fit into DDR (IngestOpened.waiting), and those whose extents
    are to be written out as they come (IngestOpened.early).
    """

    ingest: int
    filled: list[tuple[Count, Count]]
    seals: list[bytes] = msgspec.field(default_factory=list)


class AbortIngest(Message, frozen=True):
    """Drop an ingest."""

    ingest: int


class AttachDocument(Message, frozen=True):
    """Lease a document, to DDR or to a group; without a group perhaps only tokens [start, stop) of it.

    One that does not exist yet is waited for `wait_seconds`, as long as its ingest goes on.
    """

    name: str
    fingerprint: bytes | None
    group: str | None
    layout: LayoutMessage | None
    deadline_seconds: float
    tokens: tuple[Count, Count] | None = None
    wait_seconds: Seconds = 0.0


class WaitLayers(Message, frozen=True):
    """Wait until that many leading layers are in DDR."""

    lease: int
    layers: int


class Renew(Message, frozen=True):
    """Push a lease's deadline out."""

    lease: int


class Report(Message, frozen=True):
    """What the engine saw of an attach, and how many queries it served."""

    lease: int
    exposed_ns: Nanoseconds
    prefill_ns: Nanoseconds
    decode_ns: Nanoseconds
    answer_tokens: Count
    strategy: Line = ""
    strategy_reason: Line = ""
    queries: Count = 1


class Detach(Message, frozen=True):
    """End a lease."""

    lease: int


class ObservePrefill(Message, frozen=True):
    """Measured prefills of a group of `ranks`: (cached tokens, new tokens, seconds)."""

    fingerprint: bytes
    points: list[tuple[Count, Count, Seconds]]
    ranks: Count = 1


class FindRing(Message, frozen=True):
    """Ask what a group in exactly this setting was measured to do."""

    setting: RingSetting


class KeepRing(Message, frozen=True):
    """What a group was measured to do, for groups in the same setting to find; replaces what was found before."""

    rate: RingRate


class MapSlabs(Message, frozen=True):
    """Send me those slabs' descriptors."""

    slabs: Annotated[list[int], msgspec.Meta(min_length=1, max_length=SLABS_AT_ONCE)]


class ListDocuments(Message, frozen=True):
    """The tenant's documents."""


class ShowDocument(Message, frozen=True):
    """One document."""

    name: str


class DeleteDocument(Message, frozen=True):
    """Forget a document."""

    name: str


class FreeDocument(Message, frozen=True):
    """Take a document down `to` "ddr", "nvme" or "none" (out of the cache), or plan to."""

    name: str
    to: str
    deadline_seconds: float
    dry_run: bool = False


class ListTiers(Message, frozen=True):
    """Capacity and use of every device."""


class MoveDone(Message, frozen=True):
    """A rank carried an order out; `code` is empty, or an error's."""

    order: int
    size_bytes: Size
    busy_ns: Nanoseconds
    elapsed_ns: Nanoseconds
    code: str = ""
    message: str = ""


Request = (
    Hello
    | Goodbye
    | RegisterSpec
    | RegisterRank
    | BeginIngest
    | CommitIngest
    | NextSlots
    | AbortIngest
    | AttachDocument
    | AttachPrefix
    | WaitLayers
    | Renew
    | Report
    | Detach
    | ObservePrefill
    | FindRing
    | KeepRing
    | MapSlabs
    | KeysOf
    | Lookup
    | LookupTokens
    | ListDocuments
    | ShowDocument
    | ExplainDocument
    | DeleteDocument
    | PinDocument
    | UnpinDocument
    | PrefetchDocument
    | CancelPrefetch
    | UnpinDocuments
    | ListPins
    | FreeDocument
    | ListTiers
    | ClearModel
    | MoveDone
    | ObjectRequest
)

# Replies -------------------------------------------------------------------------------------------


class Done(Message, frozen=True):
    """It is done."""


class Refused(Message, frozen=True):
    """It is not, and why; `holders` are those who would have to let go, where that is the reason."""

    code: str
    message: str
    holders: list[Holder] = msgspec.field(default_factory=list)


class Welcome(Message, frozen=True):
    """The connection's client number and the daemon's version."""

    client: int
    version: int
    daemon: str


class SpecRegistered(Message, frozen=True):
    """The model's fingerprint."""

    fingerprint: bytes


class IngestOpened(Message, frozen=True):
    """Slots to fill (`runs`), tokens that are there already, and the shard in the group, if one was named.

    `waiting` are extents that get their slots later, as (first token, tokens, layer group), in order: see NextSlots.
    `early`: what is complete may be handed over before the rest is, and is on NVMe sooner then.
    """

    ingest: int
    cached_tokens: int
    runs: list[RunMessage]
    shard: ShardMessage | None
    waiting: list[tuple[int, int, int]] = msgspec.field(default_factory=list)
    early: bool = False

    @property
    def parts(self) -> Parts:
        """The extents to fill, in order."""
        return Parts(self.runs)


class SlotsGiven(Message, frozen=True):
    """Slots to fill next; none when no extent waits for one any more."""

    runs: list[RunMessage]

    @property
    def parts(self) -> Parts:
        """The extents to fill."""
        return Parts(self.runs)


class Attached(Message, frozen=True):
    """The lease; where the extents lie in DDR (no group), or the shard (group); leading layers that may be read.

    `document` is what is leased. `token_count` is all of its tokens, or as many leading ones as a prefix has matched.
    """

    lease: int
    fingerprint: bytes
    token_count: int
    spec: KVSpec
    runs: list[RunMessage]
    shard: ShardMessage | None
    layers_ready: int
    document: str

    @property
    def parts(self) -> Parts:
        """The extents, in document order, layer group by layer group."""
        return Parts(self.runs)


class LayersReady(Message, frozen=True):
    """Leading layers that may be read."""

    layers: int


class Receipt(Message, frozen=True):
    """A swap record."""

    swap: SwapView


class RingFound(Message, frozen=True):
    """The newest measurement, if there is one."""

    rate: RingRate | None


class SlabsMapped(Message, frozen=True):
    """The descriptors beside this frame are these slabs', in order, each of `size_bytes`; serials of their memory."""

    slabs: list[tuple[int, int]]
    size_bytes: int


class Documents(Message, frozen=True):
    """Documents."""

    documents: list[DocumentView]


class FreedPlan(Message, frozen=True):
    """What left, or would leave."""

    victims: list[VictimView]


class Tiers(Message, frozen=True):
    """Devices."""

    tiers: list[TierView]


Reply = (
    Done
    | Refused
    | Welcome
    | SpecRegistered
    | IngestOpened
    | SlotsGiven
    | Attached
    | LayersReady
    | Receipt
    | RingFound
    | SlabsMapped
    | Keys
    | Found
    | Documents
    | Pinned
    | Hinted
    | Explained
    | Pins
    | FreedPlan
    | Tiers
    | ObjectReply
    | Cleared
)
