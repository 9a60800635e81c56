"""`holdfast free`: take documents, or bytes, down to a lower tier now."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_session import seconds, session_of, split
from .kvstore.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType


class Place(StrEnum):
    """Where what is freed goes."""

    DDR = "ddr"
    NVME = "nvme"
    NONE = "none"


def free(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[[TENANT/]NAME]", help="The document to free.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", metavar="SIZE", help="Free that much instead: 1GiB.")] = None,
    to: Annotated[Place, typer.Option(help="All copies above this tier leave; none: out of the cache.")] = Place.NVME,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would leave, and change nothing.")] = False,
    deadline: Annotated[str, typer.Option(metavar="DURATION", help="How long to wait; it goes on after that.")] = "30s",
) -> None:
    """Take a document, or bytes, down to a tier now. A document that is freed to none keeps its name (see doc rm)."""
    session = session_of(ctx)
    wait = seconds(deadline)
    if wait is None:
        raise InvalidRequest("every wait has an end: give --deadline a duration")
    body = target(name, size) | {"to": to, "dry_run": dry_run, "deadline_seconds": wait}
    rest = session.rest()
    with session.patience("freeing"):
        found = rest.post("/v1/evictions", body, timeout_seconds=wait + 10)

    def human() -> list[RenderableType]:
        from . import cli_tables

        verb = {"planned": "would be freed", "done": "freed", "running": "being freed"}[found["state"]]
        said = f"{cli_tables.size(found['size_bytes'])} {verb}, down to {to}" if found["plan"] else "nothing to free"
        return [cli_tables.victims(found["plan"]), said] if found["plan"] else [said]

    session.show(found, human)
    if found["state"] == "running":
        print(f"not done after {deadline}; it goes on", file=sys.stderr)


def target(name: str | None, size: str | None) -> dict[str, object]:
    """What to free: a document or bytes."""
    from .kvstore.sizes import parse_size

    if (name is None) == (size is None):
        raise InvalidRequest("name either a document or --bytes")
    if name is not None:
        tenant, document = split(name)
        return {"tenant": tenant, "document": document}
    try:
        return {"bytes": parse_size(size)}
    except ValueError as error:
        raise InvalidRequest(f"--bytes {size}: {error}; say 1GiB, 500MB or a number of bytes") from error
