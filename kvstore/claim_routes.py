"""Claim routes: pins and leases over REST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final, Literal

import msgspec
from aiohttp import web

from .claim_views import LeaseView, PinView, lease_view, pin_view
from .claims import Pin, PinKind, PinSelection, Refresh
from .document import DocumentId
from .errors import InvalidRequest
from .problems import body, query, reply, told
from .residency import Tier
from .service import Service

DEFAULT_TENANT: Final = "default"
DEFAULT_PIN_SECONDS: Final = 3600.0  # a pin has an end unless told otherwise
NAMES_MAX: Final = 1000

Near = Literal["hbm", "ddr", "nvme"]
Note = Annotated[str, msgspec.Meta(max_length=255)]


class PinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pin a document. `ttl_seconds` null means until it is unpinned; `refresh` "hit": every use starts it again.

    A "hard" pin forbids leaving; what has a "soft" one leaves after all that is not pinned, sooner as its end nears.
    """

    tenant: str = DEFAULT_TENANT
    document: str
    tier: Near = "ddr"
    ttl_seconds: float | None = DEFAULT_PIN_SECONDS
    owner: Note = ""
    reason: Note = ""
    kind: PinKind = PinKind.HARD
    refresh: Refresh = Refresh.NEVER


class PinsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which pins: those that all of these are true of."""

    tenant: str | None = None
    owner: str | None = None
    reason_prefix: str | None = None

    def selection(self) -> PinSelection:
        """As a value."""
        return PinSelection(self.tenant, self.owner, self.reason_prefix)


class UnpinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End many pins in one commit: those that all that is named is true of; `everything` where nothing is.

    `documents` are [TENANT/]NAME. `dry_run` shows them and changes nothing.
    """

    tenant: str | None = None
    owner: str | None = None
    reason_prefix: str | None = None
    documents: Annotated[list[str], msgspec.Meta(max_length=NAMES_MAX)] | None = None
    everything: bool = False
    dry_run: bool = False

    def selection(self) -> PinSelection:
        """As a value. Raises InvalidRequest."""
        named = (self.tenant, self.owner, self.reason_prefix, self.documents)
        is_named = any(value is not None for value in named)
        if self.everything and is_named:
            raise InvalidRequest("everything, and tenant, owner, reason_prefix or documents: say one or the other")
        if not self.everything and not is_named:
            raise InvalidRequest("say whose pins end: tenant, owner, reason_prefix or documents, or else everything")
        names = None
        if self.documents is not None:
            split = [name.rpartition("/") for name in self.documents]
            names = {DocumentId(tenant or self.tenant or DEFAULT_TENANT, name) for tenant, _, name in split}
        return PinSelection(self.tenant, self.owner, self.reason_prefix, names)


class PinsView(msgspec.Struct, frozen=True, kw_only=True):
    """Pins; what all pins take of the budgets they share. Every pin counts on NVMe, those at DDR or HBM in DDR too."""

    pins: list[PinView]
    pinned_bytes: int
    budget_bytes: int | None
    ddr_pinned_bytes: int
    ddr_budget_bytes: int | None


class UnpinnedView(msgspec.Struct, frozen=True, kw_only=True):
    """Pins that ended ("done"), or would ("planned")."""

    state: str
    size_bytes: int
    pins: list[PinView]


class LeasesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which leases."""

    tenant: str | None = None
    overdue: bool | None = None


class LeasesView(msgspec.Struct, frozen=True, kw_only=True):
    """Leases, the one held longest first."""

    leases: list[LeaseView]


class ClaimRoutes:
    """The handlers. `must_be_ready` raises while the daemon cannot serve."""

    def __init__(self, service: Service, must_be_ready: Callable[[], None]) -> None:
        self.service = service
        self.must_be_ready = must_be_ready

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [
            web.get("/v1/pins", self.pins),
            web.post("/v1/pins", self.pin),
            web.post("/v1/pins/unpin", self.unpin_many),
            web.delete("/v1/pins/{tenant:[^/]+}/{name:[^/]+}", self.unpin),
            web.get("/v1/leases", self.leases),
        ]

    def _view(self, pin: Pin) -> PinView:
        return pin_view(pin, self.service.clock.wall_ns())

    async def pins(self, request: web.Request) -> web.Response:
        """Pins, by tenant and name."""
        pins = self.service.state.pins
        found = PinsView(
            pins=[self._view(pin) for pin in pins.select(query(request, PinsQuery).selection())],
            pinned_bytes=pins.bytes_in(Tier.NVME),
            budget_bytes=pins.budget.nvme_bytes,
            ddr_pinned_bytes=pins.bytes_in(Tier.DDR),
            ddr_budget_bytes=pins.budget.ddr_bytes,
        )
        return reply(found)

    async def pin(self, request: web.Request) -> web.Response:
        """Pin a document, or replace its pin; answered when the catalog has it."""
        self.must_be_ready()
        wanted = await body(request, PinRequest)
        document, floor, seconds = (
            DocumentId(wanted.tenant, wanted.document),
            Tier[wanted.tier.upper()],
            wanted.ttl_seconds,
        )
        made: list[Pin] = []
        await told(
            lambda done: made.append(
                self.service.pin(
                    document, floor, seconds, wanted.owner, wanted.reason, wanted.kind, wanted.refresh, done
                )
            )
        )
        return reply(self._view(made[0]), status=201)

    async def unpin(self, request: web.Request) -> web.Response:
        """End a pin; answers with what it was, when the catalog has forgotten it."""
        self.must_be_ready()
        document = DocumentId(request.match_info["tenant"], request.match_info["name"])
        ended: list[Pin] = []
        await told(lambda done: ended.append(self.service.unpin(document, done)))
        return reply(self._view(ended[0]))

    async def unpin_many(self, request: web.Request) -> web.Response:
        """End many pins, or show which ones would end."""
        self.must_be_ready()
        wanted = await body(request, UnpinRequest)
        selection = wanted.selection()
        ended: list[Pin] = []
        if wanted.dry_run:
            ended = self.service.state.pins.select(selection)
        else:
            await told(lambda done: ended.extend(self.service.unpin_all(selection, done)))
        view = UnpinnedView(
            state="planned" if wanted.dry_run else "done",
            size_bytes=sum(pin.size_bytes for pin in ended),
            pins=[self._view(pin) for pin in ended],
        )
        return reply(view)

    async def leases(self, request: web.Request) -> web.Response:
        """Who uses what, longest held first."""
        wanted = query(request, LeasesQuery)
        state, now_ns = self.service.state, self.service.clock.monotonic_ns()
        found = [
            lease_view(lease, now_ns, state.pids.get(lease.owner))
            for lease in sorted(state.leases.values(), key=lambda lease: lease.granted_ns)
            if wanted.tenant in (None, lease.document.tenant) and wanted.overdue in (None, lease.overdue(now_ns))
        ]
        return reply(LeasesView(leases=found))
