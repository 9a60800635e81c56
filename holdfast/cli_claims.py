"""Pins and leases on the command line: what operators keep near, and who uses what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .cli_session import Name, TierName, seconds, session_of, split, user
from .kvstore.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

Tenant = Annotated[str | None, typer.Option(help="Only this tenant's.")]
Owner = Annotated[str | None, typer.Option(help="Only those that this person made.")]
Reason = Annotated[str | None, typer.Option(metavar="PREFIX", help="Only those whose reason begins with this.")]


def pin(
    ctx: typer.Context,
    name: Name,
    tier: Annotated[TierName, typer.Option(help="It never sinks below this one.")] = TierName.DDR,
    ttl: Annotated[str, typer.Option(metavar="DURATION", help='90s, 30m, 1h, 2d or "never".')] = "1h",
    reason: Annotated[str, typer.Option(help="Why, for those who come after you.")] = "",
    soft: Annotated[
        bool, typer.Option("--soft", help="Forbid nothing: it leaves after what is not pinned, sooner near its end.")
    ] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Each use of it starts the TTL again.")] = False,
) -> None:
    """Keep a document at or above a tier, and bring it there; what is in its way is named where it does not fit."""
    session = session_of(ctx)
    tenant, document = split(name)
    body = {
        "tenant": tenant,
        "document": document,
        "tier": tier,
        "ttl_seconds": seconds(ttl),
        "owner": user(),
        "reason": reason,
        "kind": "soft" if soft else "hard",
        "refresh": "hit" if refresh else "never",
    }
    found = session.rest().post("/v1/pins", body)

    def human() -> list[RenderableType]:
        from .cli_tables import moment, size

        until = moment(found["expires_wall_ns"])
        softly = " softly" if soft else ""
        return [f"{tenant}/{document} pinned{softly} to {found['tier']} until {until} ({size(found['size_bytes'])})"]

    session.show(found, human)


def unpin(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[[TENANT/]NAME]...", help="Documents.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All pins of all tenants.")] = False,
    tenant: Tenant = None,
    owner: Owner = None,
    reason: Reason = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which pins would end, and change nothing.")] = False,
) -> None:
    """Let documents sink again: those named, or all that the options are true of, in one call."""
    from .rest import document_path

    session = session_of(ctx)
    rest = session.rest()
    is_one = names is not None and len(names) == 1 and not (everything or tenant or owner or reason or dry_run)
    if names and is_one:
        found = rest.delete(f"/v1/pins/{document_path(*split(names[0]))}")
        session.show(found, lambda: [f"{found['tenant']}/{found['document']} unpinned"])
        return
    if names and tenant:
        raise InvalidRequest("say TENANT/NAME, or --tenant without names")
    body: dict[str, object] = {
        "tenant": tenant,
        "owner": owner,
        "reason_prefix": reason,
        "everything": everything,
        "dry_run": dry_run,
    }
    if names:
        body["documents"] = ["/".join(split(name)) for name in names]
    found = rest.post("/v1/pins/unpin", body)

    def human() -> list[RenderableType]:
        from .cli_claim_tables import pins as shown
        from .cli_tables import size

        verb = "would end" if dry_run else "ended"
        count = len(found["pins"])
        said = f"{count} pin{'s' * (count != 1)} {verb} ({size(found['size_bytes'])})"
        return [shown(found["pins"]), said] if found["pins"] else ["no such pins"]

    session.show(found, human)


def pins(ctx: typer.Context, tenant: Tenant = None, owner: Owner = None, reason: Reason = None) -> None:
    """Who keeps what near and why, how long it lasts, and what of the budgets is left."""
    session = session_of(ctx)
    given = {"tenant": tenant, "owner": owner, "reason_prefix": reason}
    found = session.rest().get("/v1/pins", {key: value for key, value in given.items() if value is not None})

    def human() -> list[RenderableType]:
        from . import cli_claim_tables

        budgets = cli_claim_tables.pin_budgets(found)
        return [cli_claim_tables.pins(found["pins"]), budgets] if found["pins"] else ["no pins", budgets]

    session.show(found, human)


def leases(
    ctx: typer.Context,
    tenant: Tenant = None,
    overdue: Annotated[bool, typer.Option("--overdue", help="Only those past their deadline.")] = False,
) -> None:
    """Who uses which documents now, held longest first; bytes stay until the holder lets go or its process ends."""
    session = session_of(ctx)
    query = ({"tenant": tenant} if tenant else {}) | ({"overdue": "true"} if overdue else {})
    found = session.rest().get("/v1/leases", query)

    def human() -> list[RenderableType]:
        from . import cli_claim_tables

        return [cli_claim_tables.leases(found["leases"])] if found["leases"] else ["no leases"]

    session.show(found, human)
