"""What leaves, over REST: free a document or bytes, and the log of all that has left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Annotated, Final

import msgspec
from aiohttp import web

from . import views
from .claim_routes import DEFAULT_TENANT
from .document import DocumentId
from .errors import DeadlineExceeded, InvalidRequest
from .freeing import To, emptied
from .planner import Victim
from .problems import Done, body, ended, query, reply
from .service import NS, Service

PAGE_MAX: Final = 1000
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)]


class LogQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of a log, newest first."""

    limit: Limit = 100


class FreeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Take one document down to a tier, or free `bytes` of the tier above it, over all tenants."""

    tenant: str | None = None
    document: str | None = None
    bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    to: To = "nvme"
    dry_run: bool = False
    deadline_seconds: Annotated[float, msgspec.Meta(ge=0, le=600)] = 30.0

    def target(self) -> DocumentId | None:
        """The document, or None for bytes. Raises InvalidRequest."""
        if (self.document is None) == (self.bytes is None):
            raise InvalidRequest("name either a document or a number of bytes to free")
        if self.document is None:
            if self.tenant is not None:
                raise InvalidRequest("bytes are freed over all tenants; leave the tenant out")
            return None
        return DocumentId(DEFAULT_TENANT if self.tenant is None else self.tenant, self.document)


class FreedView(msgspec.Struct, frozen=True, kw_only=True):
    """What leaves. `state` is "planned" (a dry run), "done", or "running" when the deadline came first."""

    state: str
    size_bytes: int
    plan: list[views.VictimView]

    @classmethod
    def of(cls, state: str, plan: Sequence[Victim]) -> FreedView:
        """Show it."""
        return cls(state=state, size_bytes=sum(v.size_bytes for v in plan), plan=views.victim_views(plan))


class FreeRoutes:
    """The handlers. `must_be_ready` raises while the daemon starts or drains."""

    def __init__(self, service: Service, must_be_ready: Callable[[], None]) -> None:
        self.service = service
        self.must_be_ready = must_be_ready

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.get("/v1/evictions", self.verdicts), web.post("/v1/evictions", self.free)]

    async def free(self, request: web.Request) -> web.Response:
        """Plan what would leave, and unless it is a dry run, carry it out and wait: 202 when it goes on."""
        self.must_be_ready()
        wanted = await body(request, FreeRequest)
        document, tier, size_bytes = wanted.target(), emptied(wanted.to), wanted.bytes or 0
        if wanted.dry_run:
            return reply(FreedView.of("planned", self.service.upkeep.plan_eviction(document, tier, size_bytes)))
        deadline_ns = self.service.clock.monotonic_ns() + int(wanted.deadline_seconds * NS)
        plan: list[Victim] = []

        def start(done: Done) -> None:
            plan.extend(self.service.evict(document, tier, size_bytes, deadline_ns, done))

        error = await ended(start)  # the service keeps the deadline
        if isinstance(error, DeadlineExceeded):
            return reply(FreedView.of("running", plan), status=202)
        if error is not None:
            raise error
        return reply(FreedView.of("done", plan))

    async def verdicts(self, request: web.Request) -> web.Response:
        """What left and why, newest first."""
        limit = query(request, LogQuery).limit
        newest = islice(reversed(self.service.state.ledger.verdicts), limit)
        return reply({"evictions": [views.verdict_view(verdict) for verdict in newest]})
