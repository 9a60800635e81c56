"""`holdfast prefetch` and `holdfast hints`: announce queries before they run, and see what becomes of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .cli_session import FAILED, seconds, session_of, split, user
from .kvstore.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from rich.console import RenderableType

Json = dict[str, Any]
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
        until = seconds(deadline)
        if not until:
            raise InvalidRequest(f"--deadline {deadline}: say for how long they are wanted: 90s, 30m, 1h")
        wanted["deadline_seconds"] = until
    rest = session.rest()
    found, missing = [], None
    for tenant, document in [split(name) for name in names]:
        try:
            found.append(rest.post("/v1/hints", {"tenant": tenant, "document": document} | wanted))
        except NotFound as error:
            missing = missing or error
    if missing is not None and not found:
        raise missing

    def human() -> list[RenderableType]:
        from . import cli_tables

        return [cli_tables.hints(found), *_reasons(found)]

    session.show({"hints": found}, human)
    if missing is not None:
        raise missing
    if any(hint["state"] == "refused" for hint in found):
        raise typer.Exit(FAILED)


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
        return [cli_tables.hints(rows), *_reasons(rows), "", counts] if rows else [counts]

    session.show(found, human)


def _reasons(found: Sequence[Json]) -> Iterator[str]:
    """Why those ended that did not end as they should have."""
    from .cli_tables import plain

    for hint in found:
        if hint["reason"]:
            name = f"{hint['tenant']}/{hint['document']}"
            yield plain(f"{name} {hint['state']}: {hint['reason'].removeprefix(f'{name}: ')}")
