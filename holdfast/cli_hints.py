"""`holdfast prefetch` and `holdfast hints`: announce queries before they run, and see what becomes of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from .cli_session import seconds, session_of, split, user
from .kvstore.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

HBM: Final = "hbm:"  # of which group, follows


def prefetch(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="[TENANT/]NAME...", help="Documents about to be used.")],
    to: Annotated[str, typer.Option(metavar="ddr|hbm:GROUP", help="Where to, as `holdfast tiers` says it.")] = "ddr",
    deadline: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Until when they are wanted; 10 minutes where not said.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="How many queries are coming on each.")] = 1,
) -> None:
    """Bring documents near before their queries run, the cheapest load per query first."""
    session = session_of(ctx)
    group = to.removeprefix(HBM) if to.startswith(HBM) else None
    if to != "ddr" and not group:
        raise InvalidRequest(f"--to {to}: say ddr, or hbm:GROUP with one of the groups that `holdfast status` shows")
    wanted = {"queries": queries, "owner": user(), "group": group}
    if deadline is not None:
        wanted["deadline_seconds"] = seconds(deadline)
    rest = session.rest()
    found = []
    for name in names:
        tenant, document = split(name)
        found.append(rest.post("/v1/hints", {"tenant": tenant, "document": document} | wanted))

    def human() -> list[RenderableType]:
        from . import cli_tables

        return [cli_tables.hints(found)]

    session.show({"hints": found}, human)


def hints(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", min=0, max=128, help="How many that have ended to show.")] = 20,
) -> None:
    """Announced queries: what is being brought near for them, in which order, and how they ended."""
    session = session_of(ctx)
    found = session.rest().get("/v1/hints", {"limit": str(limit)})

    def human() -> list[RenderableType]:
        from . import cli_tables

        rows = [*found["hints"], *found["ended"]]
        counts = cli_tables.hint_counts(found)
        return [cli_tables.hints(rows), "", counts] if rows else [counts]

    session.show(found, human)
