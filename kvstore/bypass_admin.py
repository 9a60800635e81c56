"""The bypass over REST: see it, turn it on with a reason, turn it off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from aiohttp import web

from .problems import body, reply, told
from .service import Service
from .switching import Switching


class BypassRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class BypassView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the cache is bypassed, why, since when, and how many requests were refused for that so far."""

    on: bool
    reason: str
    since_wall_ns: int | None
    refused: int


class BypassRoutes:
    """The handlers. `must_be_ready` raises while the daemon starts or drains."""

    def __init__(self, service: Service, must_be_ready: Callable[[], None]) -> None:
        self.service = service
        self.must_be_ready = must_be_ready
        self.switching = Switching(service.store)

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [
            web.get("/v1/bypass", self.show),
            web.put("/v1/bypass", self.turn_on),
            web.delete("/v1/bypass", self.turn_off),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """See BypassView."""
        bypass = self.service.state.bypass
        view = BypassView(
            on=bypass is not None,
            reason=bypass.reason if bypass is not None else "",
            since_wall_ns=bypass.since_wall_ns if bypass is not None else None,
            refused=self.service.state.ledger.counts["bypassed"],
        )
        return reply(view)

    async def turn_on(self, request: web.Request) -> web.Response:
        """Every engine goes on without the cache; answered when a restart would know it too."""
        self.must_be_ready()
        reason = (await body(request, BypassRequest)).reason
        await told(lambda done: self.switching.turn_on(reason, done))
        return await self.show(request)

    async def turn_off(self, request: web.Request) -> web.Response:
        """Serve again; the same answer where it was off."""
        self.must_be_ready()
        await told(self.switching.turn_off)
        return await self.show(request)
