"""Admin: the service for people and their tools, as JSON over HTTP under /v1.

Looking never perturbs: reads touch no recency and grant no lease. All handlers run on the service's thread.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Final

import msgspec
from aiohttp import web

from . import views
from .bypass_admin import BypassRoutes
from .calibrations import Calibrations
from .claim_routes import ClaimRoutes, Near
from .document import DocumentId
from .errors import InvalidRequest, Unavailable
from .explain_admin import ExplainRoutes
from .free_admin import FreeRoutes, Limit, LogQuery
from .hint_admin import HintRoutes
from .metrics import Metrics
from .model_admin import ModelRoutes
from .object_routes import ObjectRoutes
from .problems import body, problems, query, reply, told
from .quality_view import QualityView, quality_views
from .recent_admin import RecentRoutes
from .residency import Tier
from .router_admin import RouterRoutes
from .service import Service
from .state import Backend, Group, hbm_device
from .tenant_admin import TenantRoutes
from .wire import PROTOCOL_VERSION

BODY_BYTES_MAX: Final = 64 << 10
SCAN_MAX: Final = 1000  # documents looked at per page: a filter that matches nothing must not hold up the loop


# Requests --------------------------------------------------------------------------------------


class DocumentsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which documents. A page may be shorter than `limit`; go on while there is a `next_cursor`."""

    tenant: str | None = None
    tier: Near | None = None
    pinned: bool | None = None
    limit: Limit = 100
    cursor: str | None = None


class DocumentChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Let a document be deleted so many seconds from now; null: never."""

    ttl_seconds: float | None


# Answers ---------------------------------------------------------------------------------------


class DocumentsPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of documents, by tenant and name."""

    documents: list[views.DocumentView]
    next_cursor: str | None


class DocumentDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A document and its extents in order."""

    document: views.DocumentView
    extents: list[views.ExtentView]


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """A group of ranks, and whose shards lie in its HBM.

    `kernel`, `communicator` and `device` are what its ranks compute with: one name, or those that differ, with commas.
    """

    name: str
    model: str
    cp: int
    tp: int
    ranks_registered: int
    complete: bool
    capacity_bytes: int
    used_bytes: int
    documents: list[str]
    kernel: str
    communicator: str
    device: str


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon at a glance. `not_ready` says why it cannot serve; null when it can.

    `bypassed`: no engine is served (see `holdfast bypass`). `unnamed` documents are those that engines stored without a
    name. `ddr_backing` says what the arena's pages are, and where. `amortisation` is how many queries were answered for
    each time that KV had to be brought near (`reattaches`); null before the first. `relieving`: tiers above their
    watermarks, which copies leave in the background.
    """

    version: str
    not_ready: str | None
    bypassed: bool
    documents: int
    unnamed: int
    leases: int
    leases_overdue: int
    pins: int
    pinned_bytes: int
    pin_budget_bytes: int | None
    reservations_waiting: int
    writes_queued: int
    orders_in_flight: int
    ddr_backing: str
    tiers: list[views.TierView]
    quality: list[QualityView]
    relieving: list[str]
    groups: list[GroupView]
    queries_answered: int
    reattaches: int
    amortisation: float | None


def installed_version() -> str:
    """The distribution's version, or "unknown" when it runs from a plain checkout."""
    try:
        return version("holdfast")
    except PackageNotFoundError:
        return "unknown"


def to_cursor(document: DocumentId) -> str:
    """An opaque mark behind that document."""
    return base64.urlsafe_b64encode(str(document).encode()).decode()


def from_cursor(cursor: str) -> DocumentId:
    """The document of a mark. Raises InvalidRequest."""
    try:
        tenant, name = base64.urlsafe_b64decode(cursor).decode().split("/")
    except ValueError as error:  # not base64, not UTF-8, not two parts
        raise InvalidRequest("this cursor came from no page") from error
    return DocumentId(tenant, name)


def named(request: web.Request) -> DocumentId:
    """The document in the path."""
    return DocumentId(request.match_info["tenant"], request.match_info["name"])


class Admin:
    """The handlers. `ready` says why the daemon cannot serve, or None; `backing` what DDR's pages are."""

    def __init__(self, service: Service, ready: Callable[[], str | None], backing: str) -> None:
        self.service = service
        self.ready = ready
        self.backing = backing
        self.metrics = Metrics(service, installed_version())

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        name = "{tenant:[^/]+}/{name:[^/]+}"  # by default aiohttp refuses braces
        return [
            web.get("/livez", self.livez),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.exposition),
            web.get("/v1/version", self.version),
            web.get("/v1/status", self.status),
            web.get("/v1/documents", self.documents),
            web.get(f"/v1/documents/{name}", self.document),
            web.patch(f"/v1/documents/{name}", self.change_document),
            web.delete(f"/v1/documents/{name}", self.delete_document),
            web.get("/v1/tiers", self.tiers),
            web.get("/v1/swaps", self.swaps),
            web.get("/v1/groups", self.groups),
        ]

    # Health ------------------------------------------------------------------------------------

    async def livez(self, request: web.Request) -> web.Response:
        """The loop turns."""
        return reply({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """It can serve; 503 with the reason when not."""
        self.must_be_ready()
        return reply({"status": "ok"})

    def must_be_ready(self) -> None:
        """Commands are refused while starting or draining; looking is always allowed."""
        reason = self.ready()
        if reason is not None:
            raise Unavailable(reason)

    async def exposition(self, request: web.Request) -> web.Response:
        """Prometheus text."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})

    async def version(self, request: web.Request) -> web.Response:
        """What runs here."""
        return reply({"version": installed_version(), "api": "v1", "protocol": PROTOCOL_VERSION})

    async def status(self, request: web.Request) -> web.Response:
        """See StatusView."""
        state, service = self.service.state, self.service
        now_ns = service.clock.monotonic_ns()
        view = StatusView(
            version=installed_version(),
            not_ready=self.ready(),
            bypassed=state.bypass is not None,
            documents=len(state.documents.named),
            unnamed=len(state.documents.unnamed),
            leases=len(state.leases),
            leases_overdue=sum(lease.overdue(now_ns) for lease in state.leases.values()),
            pins=len(state.pins.all()),
            pinned_bytes=state.pins.bytes_in(Tier.NVME),
            pin_budget_bytes=state.pins.budget.nvme_bytes,
            reservations_waiting=service.room.waiting,
            writes_queued=service.writes.queued,
            orders_in_flight=service.store.orders_in_flight,
            ddr_backing=self.backing,
            tiers=views.tier_views(state),
            quality=quality_views(state.quality),
            relieving=[tier.label for tier in service.watermarks.relieving],
            groups=[self._group(group) for group in state.groups.values()],
            queries_answered=state.ledger.counts["queries_answered"],
            reattaches=state.ledger.counts["reattaches"],
            amortisation=state.ledger.amortisation,
        )
        return reply(view)

    # Documents ---------------------------------------------------------------------------------

    async def documents(self, request: web.Request) -> web.Response:
        """A page of documents."""
        wanted = query(request, DocumentsQuery)
        after = from_cursor(wanted.cursor) if wanted.cursor is not None else None
        names = heapq.nsmallest(SCAN_MAX + 1, self._matching(wanted, after))
        page: list[views.DocumentView] = []
        last = None
        for last in islice(names, SCAN_MAX):
            view = views.document_view(self.service.state, self.service.planner, self.service.state.document(last))
            if wanted.tier is None or view.resident_bytes.get(wanted.tier):
                page.append(view)
                if len(page) == wanted.limit:
                    break
        more = last is not None and last != names[-1]
        return reply(DocumentsPage(documents=page, next_cursor=to_cursor(last) if more and last else None))

    def _matching(self, wanted: DocumentsQuery, after: DocumentId | None) -> Iterator[DocumentId]:
        """Documents behind the cursor that pass the filters which cost nothing to check."""
        pins = self.service.state.pins
        for document in self.service.state.documents.named:
            if after is not None and document <= after:
                continue
            if wanted.tenant is not None and document.tenant != wanted.tenant:
                continue
            if wanted.pinned is None or (pins.get(document) is not None) == wanted.pinned:
                yield document

    async def document(self, request: web.Request) -> web.Response:
        """One document with its extents."""
        known = self.service.state, self.service.planner, self.service.state.document(named(request))
        return reply(DocumentDetail(document=views.document_view(*known), extents=views.extent_views(*known)))

    async def change_document(self, request: web.Request) -> web.Response:
        """Set when a document ends; answered when a restart would know it too."""
        self.must_be_ready()
        document, wanted = named(request), await body(request, DocumentChange)
        await told(lambda done: self.service.expiry.set(document, wanted.ttl_seconds, done))
        return await self.document(request)

    async def delete_document(self, request: web.Request) -> web.Response:
        """Forget a document; answered when the catalog has forgotten it too."""
        self.must_be_ready()
        await told(lambda done: self.service.delete(named(request), done))
        return web.Response(status=204)

    # The rest ----------------------------------------------------------------------------------

    async def tiers(self, request: web.Request) -> web.Response:
        """Every device, and how good evictions were in each tier."""
        state = self.service.state
        return reply({"tiers": views.tier_views(state), "quality": quality_views(state.quality)})

    async def swaps(self, request: web.Request) -> web.Response:
        """Receipts of attaches, newest first."""
        limit = query(request, LogQuery).limit
        newest = islice(reversed(self.service.state.ledger.swaps), limit)
        return reply({"swaps": [views.swap_view(swap) for swap in newest]})

    async def groups(self, request: web.Request) -> web.Response:
        """Groups of ranks."""
        return reply({"groups": [self._group(group) for group in self.service.state.groups.values()]})

    def _group(self, group: Group) -> GroupView:
        backend = Backend(*(", ".join(sorted(set(names))) for names in zip(*group.backends.values(), strict=True)))
        return GroupView(
            name=group.name,
            model=self.service.state.specs[group.fingerprint].model,
            cp=group.cp,
            tp=group.tp,
            ranks_registered=len(group.seats),
            complete=group.complete,
            capacity_bytes=group.capacity_bytes,
            used_bytes=self.service.state.ledger.occupancy(hbm_device(group.name)),
            documents=sorted({str(shard.document) for shard in group.shards.values()}),
            kernel=backend.kernel,
            communicator=backend.communicator,
            device=backend.device,
        )


def make_app(service: Service, ready: Callable[[], str | None], backing: str) -> web.Application:
    """The admin API over a service. `ready` returns why it cannot serve, or None; `backing` is shown as it is."""
    app = web.Application(middlewares=[problems], client_max_size=BODY_BYTES_MAX)
    admin = Admin(service, ready, backing)
    for part in (ClaimRoutes, HintRoutes, FreeRoutes, BypassRoutes, ModelRoutes, ObjectRoutes):
        app.add_routes(part(service, admin.must_be_ready).routes())
    for looking in (Calibrations, ExplainRoutes, RecentRoutes, RouterRoutes, TenantRoutes):
        app.add_routes(looking(service).routes())
    app.add_routes(admin.routes())
    return app
