"""Client: the daemon's commands as methods, and its shared memory as buffers. Knows no engine and no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .calibration import RingRate, RingSetting
from .claim_messages import ListPins, PinDocument, Pinned, Pins, UnpinDocument, UnpinDocuments
from .claim_views import PinView
from .commands import Command
from .connection import REPLY_SECONDS, Connection
from .document import WritePolicy
from .errors import TokenOutOfRange
from .explain_view import ExplainView
from .explain_wire import ExplainDocument, Explained
from .hint_views import HintView
from .hint_wire import CancelPrefetch, Hinted, PrefetchDocument
from .keys import Extras
from .layout import Layout
from .layouts import LayoutMessage
from .mappings import Mappings
from .model_messages import Cleared, ClearModel
from .object_client import ObjectClient
from .prefix_wire import AttachPrefix, Found, Keys, KeysOf, Lookup, LookupTokens, extra_parts
from .runs import PartMessage, RunMessage
from .spec import KVSpec
from .views import DocumentView, PrefixView, SwapView, TierView, VictimView
from .wire import (
    AbortIngest,
    AttachDocument,
    Attached,
    BeginIngest,
    CommitIngest,
    DeleteDocument,
    Detach,
    Documents,
    Done,
    FindRing,
    FreeDocument,
    FreedPlan,
    IngestOpened,
    KeepRing,
    LayersReady,
    ListDocuments,
    ListTiers,
    MoveDone,
    NextSlots,
    ObservePrefill,
    Receipt,
    RegisterRank,
    RegisterSpec,
    Renew,
    Reply,
    Report,
    Request,
    RingFound,
    ShowDocument,
    SlotsGiven,
    SpecRegistered,
    Tiers,
    WaitLayers,
)

R = TypeVar("R")
HINT_REPLY_SECONDS = 2.0  # a hint is not worth more
MARGIN_SECONDS = 5.0  # the daemon answers at its deadline; give the answer time to arrive


class Client:
    """One connection to a daemon, for one tenant. Methods may be called from any thread.

    Every method raises the daemon's refusals as they are (see errors), DeadlineExceeded, or DaemonUnavailable.
    """

    def __init__(
        self,
        socket: Path,
        tenant: str = "default",
        *,
        resume: list[int] | None = None,
        on_command: Callable[[Command], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_unmap: Callable[[memoryview], None] | None = None,
    ) -> None:
        self._connection = Connection(socket, tenant, resume=resume, on_command=on_command, on_lost=on_lost)
        self._mappings = Mappings(self._connection, on_unmap)
        self._ready: dict[int, int] = {}  # by lease: leading layers known to be readable
        self.tenant = tenant
        self.objects = ObjectClient(self._ask, self.views)

    @property
    def number(self) -> int:
        """What the daemon calls this connection."""
        return self._connection.client

    @property
    def is_open(self) -> bool:
        """Whether the daemon is still there, as far as we know."""
        return self._connection.is_open

    def close(self) -> None:
        """Let go of every claim and disconnect. Views of shared memory must not be used any more."""
        self._connection.close()
        self._mappings.close()

    def _ask(self, kind: type[R], body: Request, deadline_seconds: float = REPLY_SECONDS) -> R:
        reply, _ = self._connection.call(body, deadline_seconds)
        assert isinstance(reply, kind), f"{type(body).__name__} was answered by {type(reply).__name__}"
        return reply

    def _do(self, body: Request) -> Reply:
        return self._connection.call(body)[0]

    # Models and documents ----------------------------------------------------------------------

    def register_spec(self, spec: KVSpec) -> bytes:
        """Make a model known; returns its fingerprint."""
        return self._ask(SpecRegistered, RegisterSpec(spec)).fingerprint

    def observe_prefill(self, fingerprint: bytes, points: Sequence[tuple[int, int, float]], ranks: int = 1) -> None:
        """Tell what prefills on a group of that many ranks took: (cached tokens, new tokens, seconds)."""
        self._do(ObservePrefill(fingerprint, list(points), ranks))

    def ring(self, setting: RingSetting) -> RingRate | None:
        """What a group in exactly that setting was measured to do, if the daemon remembers one."""
        return self._ask(RingFound, FindRing(setting)).rate

    def keep_ring(self, rate: RingRate) -> None:
        """Give a measurement to all groups in the same setting; returns when it will survive a restart."""
        self._do(KeepRing(rate))

    def documents(self) -> list[DocumentView]:
        """The tenant's documents, by name."""
        return self._ask(Documents, ListDocuments()).documents

    def document(self, name: str) -> DocumentView:
        """One document."""
        return self._ask(Documents, ShowDocument(name)).documents[0]

    def delete(self, name: str) -> None:
        """Forget a document and the KV that only it needs."""
        self._do(DeleteDocument(name))

    def pin(
        self,
        name: str,
        tier: str = "ddr",
        *,
        ttl_seconds: float | None = None,
        owner: str = "",
        reason: str = "",
        kind: str = "hard",
        refresh: str = "never",
    ) -> PinView:
        """Keep a document at or above a tier; returns when the pin will survive a restart.

        "hard" forbids leaving; what has a "soft" pin leaves after all that is not pinned, sooner as its end nears.
        `refresh` "hit": each attach and each publication starts its life again. Raises PinsOvercommitted, whose
        `holders` are the pins that would have to go. StorageFailed: it holds, but is not written down yet.
        """
        return self._ask(Pinned, PinDocument(name, tier, ttl_seconds, owner, reason, kind, refresh)).pin

    def unpin(self, name: str) -> PinView:
        """Let it sink again."""
        return self._ask(Pinned, UnpinDocument(name)).pin

    def prefetch(
        self,
        name: str,
        *,
        group: str | None = None,
        queries: int = 1,
        deadline_seconds: float | None = None,
        owner: str = "",
    ) -> HintView:
        """Say that queries on a document are coming, so that it is in DDR, or in a group, before they are.

        Again with other numbers brings the hint up to date. Raises NoCapacity when too many hints wait.
        """
        body = PrefetchDocument(name, group, queries, deadline_seconds, owner)
        return self._ask(Hinted, body, HINT_REPLY_SECONDS).hint

    def cancel_prefetch(self, name: str, *, group: str | None = None, owner: str = "") -> None:
        """They are not coming after all; done, too, where there is no such hint any more."""
        self._ask(Done, CancelPrefetch(name, group, owner), HINT_REPLY_SECONDS)

    def explain(self, name: str) -> ExplainView:
        """Why a document is where it is, what it has lost, and what bringing that back costs.

        Also of one that is no more. Raises DocumentNotFound where nothing is remembered of it.
        """
        return self._ask(Explained, ExplainDocument(name)).explanation

    def unpin_all(
        self, *, owner: str | None = None, reason_prefix: str | None = None, names: Sequence[str] | None = None
    ) -> list[PinView]:
        """End all of the tenant's pins that this is true of, together; None is true of all. Returns what they were."""
        listed = None if names is None else list(names)
        return self._ask(Pins, UnpinDocuments(owner, reason_prefix, listed)).pins

    def pins(self) -> list[PinView]:
        """The tenant's pins, by document."""
        return self._ask(Pins, ListPins()).pins

    def free(self, name: str, to: str = "nvme", *, deadline_seconds: float = 60.0) -> list[VictimView]:
        """Take a document down to "ddr", "nvme" or "none" (out of the cache); returns when it has happened."""
        body = FreeDocument(name, to, deadline_seconds)
        return self._ask(FreedPlan, body, deadline_seconds + MARGIN_SECONDS).victims

    def plan_free(self, name: str, to: str = "nvme") -> list[VictimView]:
        """What `free` would do; nothing changes."""
        return self._ask(FreedPlan, FreeDocument(name, to, 1.0, dry_run=True)).victims

    def clear_model(self, fingerprints: Sequence[bytes], scope: str = "all", deadline_seconds: float = 60.0) -> int:
        """Forget what this tenant stored under these specs: "all", or what has no name ("unnamed"); how many went.

        What is leased, pinned or being written stays.
        """
        return self._ask(Cleared, ClearModel(list(fingerprints), scope), deadline_seconds).deleted

    def tiers(self) -> list[TierView]:
        """Capacity and use of every device."""
        return self._ask(Tiers, ListTiers()).tiers

    # Ingest and attach -------------------------------------------------------------------------

    def begin_ingest(
        self,
        name: str,
        fingerprint: bytes,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        *,
        write_policy: WritePolicy = WritePolicy.AUTO,
        group: str | None = None,
        chunk_tokens: int = 2048,
        deadline_seconds: float = 60.0,
        layout: Layout | None = None,
        ttl_seconds: float | None = None,
        extras: Extras | None = None,
    ) -> IngestOpened:
        """Open an ingest: slots to fill, or a shard to prefill into when a group is named.

        A document of that name may be there if these tokens continue it; "" makes an unnamed one, which is found by its
        tokens, and forgotten with its last copy. `layout` says who is to have which tokens.
        So many seconds after it is published the document is deleted; None: never, or when that of this name would be.
        `extras`: what its KV depends on besides tokens, by the index of the block where it begins.
        """
        body = BeginIngest(
            name,
            fingerprint,
            token_bytes(tokens),
            write_policy,
            group,
            chunk_tokens,
            deadline_seconds,
            LayoutMessage.of(layout) if layout is not None else None,
            ttl_seconds,
            extra_parts(extras),
        )
        return self._ask(IngestOpened, body, deadline_seconds + MARGIN_SECONDS)

    def commit_ingest(self, ingest: int, seals: Sequence[bytes] = (), deadline_seconds: float = 600.0) -> DocumentView:
        """Publish it: returns when the document is complete and visible.

        `seals` are this process' own, one per extent of IngestOpened (see `seal`), or empty for the daemon to make.
        A wrong seal harms this document alone: what it covers is found corrupt when it is read.
        """
        body = CommitIngest(ingest, list(seals), deadline_seconds)
        return self._ask(Documents, body, deadline_seconds + MARGIN_SECONDS).documents[0]

    def next_slots(
        self,
        ingest: int,
        filled: Sequence[tuple[int, int]],
        seals: Sequence[bytes] = (),
        deadline_seconds: float = 600.0,
    ) -> SlotsGiven:
        """Hand over filled extents, each as (first token, layer group); returns as soon as there are free slots."""
        return self._ask(SlotsGiven, NextSlots(ingest, list(filled), list(seals)), deadline_seconds)

    def abort_ingest(self, ingest: int) -> None:
        """Drop it without a trace."""
        self._do(AbortIngest(ingest))

    def attach(
        self,
        name: str,
        *,
        fingerprint: bytes | None = None,
        group: str | None = None,
        layout: Layout | None = None,
        tokens: tuple[int, int] | None = None,
        deadline_seconds: float = 60.0,
        wait_seconds: float = 0.0,
    ) -> Attached:
        """Lease a document, or tokens [start, stop) of it, and start bringing it to DDR; or into a group.

        One that does not exist yet may be waited for: until it is published, or its ingest ends without it.
        """
        wanted = LayoutMessage.of(layout) if layout is not None else None
        body = AttachDocument(name, fingerprint, group, wanted, deadline_seconds, tokens, wait_seconds)
        attached = self._ask(Attached, body, wait_seconds + deadline_seconds + MARGIN_SECONDS)
        self._ready[attached.lease] = attached.layers_ready
        return attached

    def attach_prefix(
        self,
        fingerprint: bytes,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        *,
        extras: Extras | None = None,
        deadline_seconds: float = 60.0,
    ) -> Attached:
        """Lease the longest prefix of these tokens that is in the cache, and start bringing it to DDR.

        `token_count` of what is returned is how many have matched, and `document` what holds them. Raises
        PrefixNotFound for a miss.
        """
        body = AttachPrefix(fingerprint, token_bytes(tokens), deadline_seconds, extra_parts(extras))
        attached = self._ask(Attached, body, deadline_seconds + MARGIN_SECONDS)
        self._ready[attached.lease] = attached.layers_ready
        return attached

    def wait_layers(self, lease: int, layers: int, deadline_seconds: float = 600.0) -> int:
        """Wait until that many leading layers are readable; returns how many are."""
        known = self._ready.get(lease, 0)
        if known < layers:
            known = self._ask(LayersReady, WaitLayers(lease, layers), deadline_seconds).layers
            if lease in self._ready:
                self._ready[lease] = known
        return known

    def renew(self, lease: int) -> None:
        """Push a lease's deadline out. Waiting for layers and reporting do that too."""
        self._do(Renew(lease))

    def report(
        self,
        lease: int,
        *,
        exposed_ns: int,
        prefill_ns: int,
        decode_ns: int,
        answer_tokens: int,
        strategy: str = "",
        strategy_reason: str = "",
        queries: int = 1,
    ) -> SwapView:
        """Tell what an attach was like, how the ranks exchanged KV and why, and how many queries it has served.

        Returns its receipt.
        """
        body = Report(lease, exposed_ns, prefill_ns, decode_ns, answer_tokens, strategy, strategy_reason, queries)
        return self._ask(Receipt, body).swap

    def detach(self, lease: int) -> None:
        """End a lease. Its views must not be used any more."""
        self._ready.pop(lease, None)
        self._do(Detach(lease))

    # Lookup ------------------------------------------------------------------------------------

    def keys_of(
        self, fingerprint: bytes, tokens: Sequence[int] | npt.NDArray[np.integer], extras: Extras | None = None
    ) -> bytes:
        """The keys of a token sequence's blocks, 16 bytes each: to ask for it, or a front of it, more than once.

        `extras`: as when it was ingested.
        """
        return self._ask(Keys, KeysOf(fingerprint, token_bytes(tokens), extra_parts(extras))).keys

    def lookup(self, fingerprint: bytes, keys: bytes) -> PrefixView:
        """How much of the sequence with these block keys is in the cache. Nothing is leased, and nothing learnt."""
        return self._ask(Found, Lookup(fingerprint, keys)).prefix

    def lookup_tokens(
        self, fingerprint: bytes, tokens: Sequence[int] | npt.NDArray[np.integer], extras: Extras | None = None
    ) -> PrefixView:
        """The same by tokens."""
        return self._ask(Found, LookupTokens(fingerprint, token_bytes(tokens), extra_parts(extras))).prefix

    # Ranks -------------------------------------------------------------------------------------

    def register_rank(
        self,
        group: str,
        rank: int,
        cp: int,
        tp: int,
        fingerprint: bytes,
        rows: int,
        *,
        kernel: str = "",
        communicator: str = "",
        device: str = "",
    ) -> None:
        """Become one rank of a group, with an arena of `rows` token rows; what it computes with is shown in status."""
        self._do(RegisterRank(group, rank, cp, tp, fingerprint, rows, kernel, communicator, device))

    def move_done(self, done: MoveDone) -> None:
        """Answer a command."""
        self._connection.notify(done)

    # Shared memory -----------------------------------------------------------------------------

    def view(self, part: PartMessage) -> memoryview:
        """The extent's slot in DDR, writable, without a copy."""
        return self.views([part])[0]

    def views(self, parts: Sequence[PartMessage | RunMessage]) -> list[memoryview]:
        """The same of many together, or all the slots of runs: see Mappings."""
        return self._mappings.views(parts)


def token_bytes(tokens: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """Token ids as little-endian uint32. Raises TokenOutOfRange for what does not fit."""
    array = np.asarray(tokens)
    if array.size and (array.dtype.kind not in "iu" or int(array.min()) < 0 or int(array.max()) >= 2**32):
        raise TokenOutOfRange("token ids are integers from 0 to 2^32 - 1, less than the vocabulary size")
    return array.astype("<u4").tobytes()
