"""Hints over REST: announce queries, see what waits and what has become of it, take a hint back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from aiohttp import web

from .document import DocumentId
from .hint_views import hint_view, hints_view
from .hints import ENDED_MAX
from .prefetching import NOBODY
from .problems import body, query, reply
from .service import Service

DEFAULT_TENANT: Final = "default"


class HintRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Queries on a document are coming. `group` null brings it to DDR."""

    tenant: str = DEFAULT_TENANT
    document: str
    group: str | None = None
    queries: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 1
    deadline_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None
    owner: Annotated[str, msgspec.Meta(max_length=255)] = ""


class HintsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of those that have ended."""

    limit: Annotated[int, msgspec.Meta(ge=0, le=ENDED_MAX)] = 20


class CancelQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of a document's hints."""

    group: str | None = None
    owner: str = ""


class HintRoutes:
    """The handlers. `must_be_ready` raises while the daemon starts or drains."""

    def __init__(self, service: Service, must_be_ready: Callable[[], None]) -> None:
        self.service = service
        self.must_be_ready = must_be_ready

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [
            web.get("/v1/hints", self.show),
            web.post("/v1/hints", self.add),
            web.delete("/v1/hints/{tenant}/{name}", self.cancel),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """See HintsView."""
        limit = query(request, HintsQuery).limit
        state = self.service.state
        return reply(hints_view(state.hints, state.ledger.counts, self.service.clock, limit))

    async def add(self, request: web.Request) -> web.Response:
        """Hint, or bring one's own hint up to date."""
        self.must_be_ready()
        wanted = await body(request, HintRequest)
        document = DocumentId(wanted.tenant, wanted.document)
        seconds, owner = wanted.deadline_seconds, wanted.owner
        hint = self.service.prefetching.hint(NOBODY, document, wanted.group, wanted.queries, seconds, owner)
        return reply(hint_view(self.service.state.hints, hint, self.service.clock), status=201)

    async def cancel(self, request: web.Request) -> web.Response:
        """Take it back; the same answer where there is none any more."""
        self.must_be_ready()
        wanted = query(request, CancelQuery)
        document = DocumentId(request.match_info["tenant"], request.match_info["name"])
        self.service.prefetching.cancel(NOBODY, document, wanted.group, wanted.owner)
        return web.Response(status=204)
