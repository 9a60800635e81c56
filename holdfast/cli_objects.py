"""`holdfast objects`: namespaces of opaque objects, which engines store under keys of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .cli_session import TierName, seconds, session_of, split, user

if TYPE_CHECKING:
    from rich.console import RenderableType

CLEAR_SECONDS: Final = 600.0  # of a million objects

objects_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Opaque objects, by namespace.")

Namespace = Annotated[str, typer.Argument(metavar="[TENANT/]NAMESPACE", help="Of an engine's objects.")]
Prefix = Annotated[str | None, typer.Option(metavar="HEX", help="Only objects whose keys begin so.")]
Keys = Annotated[list[str] | None, typer.Option("--key", metavar="HEX", help="Only this object; may be repeated.")]


def _path(name: str) -> str:
    from .rest import document_path

    return f"/v1/objects/{document_path(*split(name))}"


@objects_app.command("ls")
def ls(ctx: typer.Context, tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None) -> None:
    """Namespaces, what they hold where, and how often they were asked."""
    session = session_of(ctx)
    found = session.rest().get("/v1/objects", {"tenant": tenant} if tenant else {})

    def human() -> list[RenderableType]:
        from .cli_tables import size, table

        columns = ("NAMESPACE", "OBJECTS", "PAYLOAD", "DDR", "NVME", "PINNED", "ASKED", "HITS")
        rows = [
            (
                f"{n['tenant']}/{n['namespace']}",
                n["objects"],
                size(n["size_bytes"]),
                size(n["resident_bytes"].get("ddr", 0)),
                size(n["resident_bytes"].get("nvme", 0)),
                n["pinned"],
                n["asked"],
                _share(n),
            )
            for n in found["namespaces"]
        ]
        return [table(columns, rows, numbers=columns[1:])] if rows else ["no objects"]

    session.show(found, human)


def _share(namespace: dict[str, Any]) -> str:
    asked = namespace["asked"]
    return f"{namespace['hits'] / asked:.0%}" if asked else "-"


@objects_app.command("show")
def show(ctx: typer.Context, namespace: Namespace) -> None:
    """One namespace."""
    session = session_of(ctx)
    found = session.rest().get(_path(namespace))

    def human() -> list[RenderableType]:
        from .cli_tables import pairs, size

        where = {tier: size(size_bytes) for tier, size_bytes in sorted(found["resident_bytes"].items())}
        rows = [
            ("namespace", f"{found['tenant']}/{found['namespace']}"),
            ("objects", found["objects"]),
            ("payload", size(found["size_bytes"])),
            ("slots", ", ".join(f"{taken} in {tier}" for tier, taken in where.items()) or "none"),
            ("pinned", found["pinned"]),
            ("asked for", found["asked"]),
            ("found", f"{found['hits']} ({_share(found)})"),
        ]
        return [pairs(rows)]

    session.show(found, human)


@objects_app.command("pin")
def pin(
    ctx: typer.Context,
    namespace: Namespace,
    prefix: Prefix = None,
    key: Keys = None,
    tier: Annotated[TierName, typer.Option(help="They never sink below this one.")] = TierName.DDR,
    ttl: Annotated[str, typer.Option(metavar="DURATION", help='90s, 30m, 1h, 2d or "never".')] = "1h",
    reason: Annotated[str, typer.Option(help="Why, for those who come after you.")] = "",
    soft: Annotated[bool, typer.Option("--soft", help="Forbid nothing: they leave after what is not pinned.")] = False,
) -> None:
    """Keep objects at or above a tier: those named, or all of the namespace; all of them, or none."""
    body = {
        "keys": key or None,
        "key_prefix": prefix,
        "tier": tier,
        "ttl_seconds": seconds(ttl),
        "owner": user(),
        "reason": reason,
        "kind": "soft" if soft else "hard",
    }
    _counted(ctx, namespace, "pin", body, f"pinned{' softly' * soft} to {tier.value}")


@objects_app.command("unpin")
def unpin(ctx: typer.Context, namespace: Namespace, prefix: Prefix = None, key: Keys = None) -> None:
    """Let objects sink again: those named, or all of the namespace."""
    _counted(ctx, namespace, "unpin", {"keys": key or None, "key_prefix": prefix}, "unpinned")


def _counted(ctx: typer.Context, namespace: str, verb: str, body: dict[str, Any], done: str) -> None:
    session = session_of(ctx)
    found = session.rest().post(f"{_path(namespace)}/{verb}", body)

    def human() -> list[RenderableType]:
        from .cli_tables import size

        return [f"{_many(found)} {done} ({size(found['size_bytes'])})"]

    session.show(found, human)


@objects_app.command("clear")
def clear(ctx: typer.Context, namespace: Namespace) -> None:
    """Forget all objects of a namespace; those that are leased, pinned or being stored stay."""
    session = session_of(ctx)
    found = session.rest().delete(_path(namespace), timeout_seconds=CLEAR_SECONDS)
    session.show(found, lambda: [f"{_many(found)} deleted"])


def _many(found: dict[str, Any]) -> str:
    count = found["objects"]
    return f"{count} object{'s' * (count != 1)}"
