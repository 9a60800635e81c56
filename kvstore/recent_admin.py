"""Recent uses over REST: for those who record what is asked of the cache."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from aiohttp import web

from .extent import ExtentId
from .problems import query, reply
from .recent import RecentUse
from .service import Service

PAGE_EXTENTS: Final = 20_000  # of one answer, unless one use alone has more


class UsesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From which number on; without one, from now on."""

    cursor: Annotated[int, msgspec.Meta(ge=0)] | None = None


class UseView(msgspec.Struct, frozen=True, kw_only=True):
    """A document's front was used: `extents` in order, each of `extent_tokens` but the last, `token_count` in all.

    `answer_tokens` were reported so far; while `open`, more may come. `at_ns` is on the clock of `now_ns`.
    """

    number: int
    at_ns: int
    document: str
    extents: list[ExtentId]
    extent_tokens: int
    token_count: int
    answer_tokens: int
    open: bool

    @classmethod
    def of(cls, use: RecentUse) -> UseView:
        """Show one."""
        return cls(
            number=use.number,
            at_ns=use.at_ns,
            document=str(use.document),
            extents=list(use.chain[: use.extent_count]),
            extent_tokens=use.extent_tokens,
            token_count=use.token_count,
            answer_tokens=use.answer_tokens,
            open=use.is_open,
        )


class UsesPage(msgspec.Struct, frozen=True, kw_only=True):
    """Uses in order, from a cursor on. `lost` of them were forgotten before they were read.

    Ask again with `next_cursor`; `newest` is what it will be when all is read. Numbers are of one `life` of the daemon:
    another begins anew.
    """

    life: int
    now_ns: int
    uses: list[UseView]
    lost: int
    next_cursor: int
    newest: int


class RecentRoutes:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.get("/v1/uses", self.uses)]

    async def uses(self, request: web.Request) -> web.Response:
        """See UsesPage."""
        cursor = query(request, UsesQuery).cursor
        recent = self.service.planner.uses.recent
        first = recent.next_number if cursor is None else min(cursor, recent.next_number)
        found = recent.since(first, PAGE_EXTENTS)
        page = UsesPage(
            life=recent.life,
            now_ns=self.service.clock.monotonic_ns(),
            uses=[UseView.of(use) for use in found],
            lost=found[0].number - first if found else 0,
            next_cursor=found[-1].number + 1 if found else first,
            newest=recent.next_number,
        )
        return reply(page)
