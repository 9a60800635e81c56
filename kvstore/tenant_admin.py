"""Tenants over REST."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web

from .problems import query, reply
from .service import Service
from .tenant_views import tenants_view


class TenantsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of them."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


class TenantRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.get("/v1/tenants", self.show)]

    async def show(self, request: web.Request) -> web.Response:
        """See TenantsView."""
        return reply(tenants_view(self.service.state, self.service.planner.tenancy, query(request, TenantsQuery).limit))
