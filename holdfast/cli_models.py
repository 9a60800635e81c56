"""`holdfast model`: whose KV is stored, and forgetting all of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from .cli_session import FAILED, session_of

if TYPE_CHECKING:
    from rich.console import RenderableType

CLEAR_SECONDS = 600.0
model_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models, and what is stored for each.")


@model_app.command("ls")
def ls(ctx: typer.Context) -> None:
    """Models that something is stored for, a line for each form their KV is stored in."""
    session = session_of(ctx)
    found = session.rest().get("/v1/models")

    def human() -> list[RenderableType]:
        return [_table(found["models"])] if found["models"] else ["nothing is stored"]

    session.show(found, human)


def _table(found: list[dict[str, Any]]) -> RenderableType:
    from .cli_tables import size, table

    columns = ("MODEL", "FINGERPRINT", "FORM", "DOCUMENTS", "UNNAMED", "DDR", "NVME")
    rows = (
        (
            model["model"],
            model["fingerprint"],
            model["page_format"] or "canonical",
            str(model["documents"]),
            str(model["unnamed"]),
            size(model["resident_bytes"].get("ddr", 0)),
            size(model["resident_bytes"].get("nvme", 0)),
        )
        for model in found
    )
    return table(columns, rows)


@model_app.command("clear")
def clear(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a fingerprint, as `model ls` shows it.")],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    unnamed: Annotated[bool, typer.Option("--unnamed", help="Only what no user has named.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much would go, and change nothing.")] = False,
) -> None:
    """Forget all that was stored for a model. What is leased, pinned or being written stays; exit code 1 says so."""
    session = session_of(ctx)
    query = {"scope": "unnamed" if unnamed else "all", "dry_run": "true" if dry_run else "false"}
    if tenant is not None:
        query["tenant"] = tenant
    found = session.rest().delete(f"/v1/models/{quote(model, safe='')}", query, timeout_seconds=CLEAR_SECONDS)

    def human() -> list[RenderableType]:
        verb = "would go" if found["state"] == "planned" else "gone"
        noun = "document" if found["deleted"] == 1 else "documents"
        lines: list[RenderableType] = [f"{found['deleted']:,} {noun} {verb}"]
        lines += [f"kept {name}: {why}" for name, why in found["kept"].items()]
        more = found["kept_count"] - len(found["kept"])
        return [*lines, *([f"and {more:,} more were kept"] if more else [])]

    session.show(found, human)
    if found["kept_count"]:
        raise typer.Exit(FAILED)
