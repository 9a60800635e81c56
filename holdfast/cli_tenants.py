"""`holdfast tenants`: what each tenant has, and what it may have."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .cli_session import session_of

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST: Final = 1000


def tenants(
    ctx: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=MOST, help="How many, those with most bytes first.")
    ] = 100,
) -> None:
    """What each tenant has of each tier, and its quotas.

    FAIR NOW is what it could have before it is the first to lose, as much as the others have now: these do not add up.
    GUARANTEED that is not used is lent to others. PINNED and IN USE (by leases and moves) are parts of USED.
    """
    session = session_of(ctx)
    found = session.rest().get("/v1/tenants", {"limit": str(limit)})

    def human() -> list[RenderableType]:
        return [shown(found["tenants"])] if found["tenants"] else ["no tenants"]

    session.show(found, human)
    if found["count"] > limit and not session.as_json:
        print(f"there are {found['count']}; see --limit", file=sys.stderr)


def shown(found: list[dict[str, Any]]) -> RenderableType:
    """A line for each tenant and tier in which it has, or may have, something of its own."""
    from .cli_tables import size, table

    columns = ("TENANT", "TIER", "USED", "GUARANTEED", "MAXIMUM", "FAIR NOW", "PINNED", "IN USE")
    rows = (
        (
            tenant["tenant"],
            tier["tier"],
            size(tier["used_bytes"]),
            size(tier["guaranteed_bytes"]),
            size(tier["maximum_bytes"]) if tier["maximum_bytes"] is not None else "-",
            size(tier["fair_bytes"]) if tier["fair_bytes"] is not None else "-",
            size(tier["pinned_bytes"]),
            size(tier["leased_bytes"]),
        )
        for tenant in found
        for tier in tenant["tiers"]
        if tier["tier"] != "hbm" or tier["used_bytes"]
    )
    return table(columns, rows, numbers=columns[2:])
