"""The small Python API: `holdfast.connect`, documents, ingest and attach as context managers, layer by layer.

For engines and scripts that hold KV as arrays and have no ranks of their own. Arrays are numpy, [kv heads, tokens,
dim]; dtypes that numpy lacks travel as their bits (bfloat16 as uint16, float8 as uint8). examples/ shows it at work;
`async_store` is its twin for asyncio.

Errors are typed (kvstore.errors). What an engine should survive by computing: Unavailable (no daemon, too slow,
draining, bypassed), NoCapacity, NotFound, DocumentIncomplete, CorruptExtent, StorageFailed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from ..kvstore.claim_views import PinView
from ..kvstore.client import Client
from ..kvstore.config import load_config
from ..kvstore.document import WritePolicy
from ..kvstore.errors import DeadlineExceeded, HoldfastError, InvalidRequest, NoCapacity
from ..kvstore.hint_views import HintView
from ..kvstore.keys import Extras
from ..kvstore.object_views import NamespaceView
from ..kvstore.spec import KVSpec
from ..kvstore.views import DocumentView, PrefixView, TierView, VictimView
from .attachment import Attachment
from .objects import Objects
from .writer import IngestWriter

AHEAD_SECONDS: Final = 0.2  # how long the next window may wait for room while the present one could be read


def connect(socket: str | Path | None = None, *, data_dir: str | Path | None = None, tenant: str = "default") -> Store:
    """Connect to a daemon on this machine: by its socket, its data directory, or where the defaults put it.

    The defaults are `holdfast serve`'s, HOLDFAST_* variables included. A tenant sees its own documents only. Raises
    DaemonUnavailable; a connection whose daemon has ended is not made again: connect anew.
    """
    if socket is None:
        overrides = {} if data_dir is None else {"daemon.data_dir": str(data_dir)}
        socket = load_config(None, os.environ, overrides).daemon.socket
    return Store(Client(Path(socket), tenant))


class Store:
    """A connection to a daemon, for one tenant. Use as a context manager, or call `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether the daemon is still there, as far as we know. A store that has lost its daemon stays so."""
        return self._client.is_open

    def close(self) -> None:
        """Let go of every claim and disconnect."""
        self._client.close()

    @contextmanager
    def ingest(
        self,
        name: str | None,
        spec: KVSpec,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        *,
        write_policy: WritePolicy = WritePolicy.AUTO,
        ttl_seconds: float | None = None,
        extras: Extras | None = None,
        deadline_seconds: float = 60.0,
    ) -> Iterator[IngestWriter]:
        """Store a document: write what is missing inside the block; leaving it publishes, an error leaves no trace.

        So many seconds later it is deleted; None: never, or when the document of this name would be. `extras`: what
        its KV depends on besides tokens (an adapter, a picture, a salt), by the index of the block where it begins.
        Without a name it is found by its tokens (`attach_prefix`), takes the place of unnamed ones that it continues,
        and is forgotten when its last copy has left.
        """
        if getattr(tokens, "ndim", 1) != 1:
            raise InvalidRequest(f"tokens are one row of token ids, not an array of shape {np.shape(tokens)}")
        if write_policy not in list(WritePolicy):  # it may come as a string
            raise InvalidRequest(f"unknown write policy {write_policy!r}; use one of {', '.join(WritePolicy)}")
        fingerprint = self._client.register_spec(spec)
        opened = self._client.begin_ingest(
            name or "",
            fingerprint,
            tokens,
            write_policy=write_policy,
            ttl_seconds=ttl_seconds,
            extras=extras,
            deadline_seconds=deadline_seconds,
        )
        published = False
        try:
            writer = IngestWriter(self._client, spec, opened, len(tokens))
            try:
                yield writer
                writer.check_complete()
                seals = writer.seals()
            finally:
                writer.release()
            self._client.commit_ingest(opened.ingest, seals)
            published = True
        finally:
            if not published:
                with suppress(HoldfastError):
                    self._client.abort_ingest(opened.ingest)

    @contextmanager
    def attach(
        self,
        name: str,
        *,
        spec: KVSpec | None = None,
        tokens: tuple[int, int] | None = None,
        deadline_seconds: float = 60.0,
    ) -> Iterator[Attachment]:
        """Lease a document, or tokens [start, stop) of it, and read it: it stays where it is until the block ends.

        Returns as soon as it has room in DDR, for which the deadline is; layers arrive while it is read. With `spec`,
        KV of other models is refused (SpecMismatch). Raises DocumentNotFound; DocumentIncomplete, naming the tokens to
        compute, when some of it is gone; NoCapacity, naming who holds DDR; and DocumentTooLarge for more than DDR can
        hold at once: see `windows`.
        """
        attachment = self._attached(name, spec, tokens, deadline_seconds)
        try:
            yield attachment
        finally:
            attachment.detach()

    @contextmanager
    def attach_prefix(
        self,
        spec: KVSpec,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        *,
        extras: Extras | None = None,
        deadline_seconds: float = 60.0,
    ) -> Iterator[Attachment]:
        """Lease the longest prefix of these tokens that is in the cache, and read it.

        The attachment's `tokens` are (0, matched), and its `document` is what holds them. `extras`: as when they were
        ingested. Raises PrefixNotFound for a miss.
        """
        fingerprint = self._client.register_spec(spec)
        attached = self._client.attach_prefix(fingerprint, tokens, extras=extras, deadline_seconds=deadline_seconds)
        attachment = Attachment(self._client, attached)
        try:
            yield attachment
        finally:
            attachment.detach()

    def _attached(
        self, name: str, spec: KVSpec | None, tokens: tuple[int, int] | None, deadline_seconds: float
    ) -> Attachment:
        fingerprint = spec.fingerprint() if spec is not None else None
        attached = self._client.attach(name, fingerprint=fingerprint, tokens=tokens, deadline_seconds=deadline_seconds)
        return Attachment(self._client, attached, tokens)

    def windows(
        self,
        name: str,
        *,
        spec: KVSpec | None = None,
        tokens: tuple[int, int] | None = None,
        window_tokens: int | None = None,
        deadline_seconds: float = 60.0,
    ) -> Iterator[Attachment]:
        """A document of any size, or a range of its tokens, one attachment after the other, in order.

        Each is given back when the next is asked for. While one is being read the next is on its way already, where
        DDR allows two; `window_tokens` defaults to what fits into a quarter of DDR. Raises as `attach` does, and
        InvalidRequest for a range that is empty or not within the document.
        """
        view = self._client.document(name)
        start, stop = tokens if tokens is not None else (0, view.token_count)
        if not 0 <= start < stop <= view.token_count:
            raise InvalidRequest(f"tokens [{start}, {stop}) are not a range of {name}'s {view.token_count} tokens")
        if window_tokens is not None and window_tokens < 1:
            raise InvalidRequest(f"window_tokens is at least 1, not {window_tokens}")
        size = window_tokens or self._quarter_of_ddr(view)
        ranges = [(low, min(low + size, stop)) for low in range(start, stop, size)]
        present = following = None
        try:
            for number, here in enumerate(ranges):
                present, following = following or self._attached(name, spec, here, deadline_seconds), None
                if number + 1 < len(ranges):
                    with suppress(NoCapacity, DeadlineExceeded):  # then it is asked for when this one is given back
                        following = self._attached(name, spec, ranges[number + 1], AHEAD_SECONDS)
                yield present
                present.detach()
                present = None
        finally:
            for attachment in (present, following):
                if attachment is not None:
                    attachment.detach()

    def _quarter_of_ddr(self, view: DocumentView) -> int:
        """Tokens of a document in a quarter of DDR."""
        capacity_bytes = sum(tier.capacity_bytes for tier in self._client.tiers() if tier.tier == "ddr")
        return max(1, capacity_bytes // 4 * view.token_count // view.size_bytes)

    def lookup(
        self, spec: KVSpec, tokens: Sequence[int] | npt.NDArray[np.integer], *, extras: Extras | None = None
    ) -> PrefixView:
        """How many leading tokens are in the cache, and in which tiers. Nothing is leased, and nothing learnt."""
        return self._client.lookup_tokens(self._client.register_spec(spec), tokens, extras)

    def objects(self, namespace: str) -> Objects:
        """Opaque bytes under keys of an engine's own. Raises InvalidName."""
        return Objects(self._client.objects, namespace)

    def namespaces(self) -> list[NamespaceView]:
        """The tenant's namespaces of objects."""
        return self._client.objects.namespaces()

    def documents(self) -> list[DocumentView]:
        """The tenant's documents, by name."""
        return self._client.documents()

    def document(self, name: str) -> DocumentView:
        """One document. Raises DocumentNotFound."""
        return self._client.document(name)

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
        """Keep a document at or above a tier, "ddr" or "nvme"; returns when the pin will survive a restart.

        A "hard" pin forbids leaving; what has a "soft" one leaves after all that is not pinned. It ends after so many
        seconds (None: never); with `refresh` "hit" each attach starts them again. Owner and reason are for people, and
        for `unpin_all`. Raises PinsOvercommitted, whose `holders` are the pins in its way.
        """
        return self._client.pin(
            name, tier, ttl_seconds=ttl_seconds, owner=owner, reason=reason, kind=kind, refresh=refresh
        )

    def unpin(self, name: str) -> PinView:
        """Let it sink again."""
        return self._client.unpin(name)

    def prefetch(
        self, name: str, *, group: str | None = None, queries: int = 1, deadline_seconds: float | None = None
    ) -> HintView:
        """Say that queries on a document are coming, so that it is in DDR, or in a group, before they are.

        The hint lasts until it is used, until its deadline, or as long as this connection. Raises DocumentNotFound, or
        NoCapacity when too many hints wait.
        """
        return self._client.prefetch(name, group=group, queries=queries, deadline_seconds=deadline_seconds)

    def unpin_all(
        self, *, owner: str | None = None, reason_prefix: str | None = None, names: Sequence[str] | None = None
    ) -> list[PinView]:
        """End all of the tenant's pins that this is true of, together; None is true of all. Returns what they were."""
        return self._client.unpin_all(owner=owner, reason_prefix=reason_prefix, names=names)

    def pins(self) -> list[PinView]:
        """The tenant's pins, by document."""
        return self._client.pins()

    def free(self, name: str, to: str = "nvme") -> list[VictimView]:
        """Take a document down to "ddr", "nvme" or "none" (out of the cache); returns when it has happened.

        Raises InUse for what is leased or pinned.
        """
        return self._client.free(name, to)

    def plan_free(self, name: str, to: str = "nvme") -> list[VictimView]:
        """What `free` would do; nothing changes."""
        return self._client.plan_free(name, to)

    def delete(self, name: str) -> None:
        """Forget a document. Raises InUse while it is leased or pinned."""
        self._client.delete(name)

    def clear(self, spec: KVSpec, scope: str = "all") -> int:
        """Forget what was stored of a model: "all", or what has no name ("unnamed"); how many documents went.

        What is leased, pinned or being written stays.
        """
        return self._client.clear_model([spec.fingerprint()], scope)

    def tiers(self) -> list[TierView]:
        """Capacity and use of every device."""
        return self._client.tiers()
