"""`holdfast trace record`: what is asked of a live daemon, as a trace that `holdfast policy simulate` replays."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_session import session_of
from .kvstore.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

trace_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Traces of what is asked of the cache.")


@trace_app.command("record")
def trace_record(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.jsonl.gz", help="Where to; it is written anew.")],
    duration: Annotated[float, typer.Option("--seconds", min=0.0, metavar="N", help="How long.")] = 60.0,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, metavar="N", help="Stop earlier, when so many have come.")
    ] = None,
    past: Annotated[
        bool, typer.Option("--past", help="Begin with the uses that the daemon still remembers: up to 4,096.")
    ] = False,
) -> None:
    """Record a daemon's uses: documents published and attached, as chains of 512-token blocks.

    One line a use: {"ts": ms since the first, "in": tokens used, "out": tokens of the answers reported so far, "sid":
    a number for each document, "runs": [first block, count, ...]}. Blocks and documents are numbered as they appear:
    neither names nor tokens nor their hashes are in the file. A block is shared where the daemon shares it: the extents
    that hold it are the same. A line waits up to 30 s for its answer. Ctrl-C ends it well.
    """
    from .recording import Past, record

    session = session_of(ctx)
    if out.suffix not in (".gz", ".jsonl"):
        raise InvalidRequest(f"--out {out}: name a .jsonl or a .jsonl.gz file")
    began = Past.REMEMBERED if past else Past.NOTHING
    with session.patience(f"recording to {out}"):
        recorder = record(session.rest(), out, duration, requests, began)
    found = {"out": str(out), "requests": recorder.requests, "blocks": recorder.blocks, "lost": recorder.lost}

    def human() -> list[RenderableType]:
        return [f"{recorder.requests:,} requests of {recorder.blocks:,} different blocks in {out}"]

    session.show(found, human)
    if recorder.lost:
        print(f"{recorder.lost} uses were lost: more came between two looks than a daemon remembers", file=sys.stderr)
