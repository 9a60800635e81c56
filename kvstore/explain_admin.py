"""Explain over REST: why a document is where it is, and what has become of what is gone."""

from __future__ import annotations

from aiohttp import web

from .document import DocumentId
from .explain_view import explain_view
from .problems import reply
from .service import Service


class ExplainRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.get("/v1/documents/{tenant:[^/]+}/{name:[^/]+}/explain", self.show)]

    async def show(self, request: web.Request) -> web.Response:
        """See ExplainView; also of a document that is no more, while it is remembered."""
        document = DocumentId(request.match_info["tenant"], request.match_info["name"])
        return reply(explain_view(self.service.state, self.service.planner, document))
