"""`holdfast bypass`: take the cache out of every engine's way, and put it back."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_session import Session, session_of

if TYPE_CHECKING:
    from rich.console import RenderableType

bypass_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Let every engine go on without the cache, or serve again. Alone: how it stands.",
)


@bypass_app.callback()
def show(ctx: typer.Context) -> None:
    """Whether the cache is bypassed, and why."""
    if ctx.invoked_subcommand is None:
        session = session_of(ctx)
        _told(session, session.rest().get("/v1/bypass"))


@bypass_app.command()
def on(
    ctx: typer.Context,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; engines' logs and `holdfast status` say it.")] = "",
) -> None:
    """Nobody finds, reads or stores KV from now on; what is stored stays. It outlives a restart.

    Groups of the built-in runner go on: their documents are their work.
    """
    session = session_of(ctx)
    _told(session, session.rest().put("/v1/bypass", {"reason": reason}))


@bypass_app.command()
def off(ctx: typer.Context) -> None:
    """Serve again."""
    session = session_of(ctx)
    _told(session, session.rest().delete("/v1/bypass"))


def _told(session: Session, found: dict[str, Any]) -> None:
    def human() -> list[RenderableType]:
        if not found["on"]:
            return ["off: engines are served"]
        since = datetime.fromtimestamp(found["since_wall_ns"] / 1e9).astimezone().isoformat(" ", "seconds")
        why = f", because: {found['reason']}" if found["reason"] else ""
        return [f"on since {since}{why}; {found['refused']:,} requests were refused for it so far"]

    session.show(found, human)
