"""The command line: `holdfast`. Data goes to stdout, everything else to stderr; slow imports load on first use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from . import __version__
from .cli_ask import ask, ingest
from .cli_bypass import bypass_app
from .cli_calibrate import calibrate
from .cli_claims import leases, pin, pins, unpin
from .cli_explain import explain, tiers
from .cli_free import free
from .cli_hints import hints, prefetch
from .cli_models import model_app
from .cli_objects import objects_app
from .cli_policy import policy_app
from .cli_runner import demo_model, runner
from .cli_session import (
    FAILED,
    ConfigFile,
    Holdfast,
    Name,
    Session,
    Settings,
    TierName,
    configuration,
    seconds,
    session_of,
    split,
)
from .cli_tenants import tenants
from .cli_trace import trace_app

if TYPE_CHECKING:
    from rich.console import RenderableType


PAGE: Final = 1000


app = typer.Typer(
    cls=Holdfast,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keeps the KV cache of long documents where it pays to keep it.",
    epilog="Global options may stand before or after the command.",
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The configuration.")
doc_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Documents.")
app.add_typer(config_app, name="config")
app.add_typer(doc_app, name="doc")
app.add_typer(model_app, name="model")
app.add_typer(bypass_app, name="bypass")
app.add_typer(objects_app, name="objects")
app.add_typer(policy_app, name="policy")
app.add_typer(trace_app, name="trace")
app.command()(calibrate)
app.command()(runner)
app.command()(ingest)
app.command()(ask)
app.command()(prefetch)
app.command()(hints)
app.command()(tiers)
app.command()(explain)
app.command()(tenants)
app.command()(free)
app.command()(demo_model)
for claim in (pin, unpin, pins, leases):
    app.command()(claim)

Limit = Annotated[int, typer.Option("--limit", min=1, max=PAGE, help="How many to show, newest first.")]


@app.callback()
def globals_(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(help="The daemon's address; $HOLDFAST_URL otherwise.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The daemon's data directory, where it leaves its address.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine output on stdout.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours; $NO_COLOR does the same.")] = False,
) -> None:
    """Read the global options."""
    color = not no_color and not os.environ.get("NO_COLOR")
    ctx.obj = Session(url=url, data_dir=data_dir, as_json=as_json, color=color)


# Running ---------------------------------------------------------------------------------------


@app.command()
def serve(ctx: typer.Context, config: ConfigFile = None, settings: Settings = None) -> None:
    """Run the daemon until it is told to stop."""
    from .kvstore.daemon import serve as run

    raise typer.Exit(run(configuration(ctx, config, settings)))


@app.command()
def demo(
    ctx: typer.Context,
    document: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="A text of your own.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="How many of its tokens to use.")] = 16_384,
) -> None:
    """Prefill, evict, reattach and decode a document, and show that nothing was lost."""
    from .demo import run_demo
    from .demo_report import Output

    session = session_of(ctx)
    output = Output.MACHINES if session.as_json else Output.PEOPLE
    raise typer.Exit(run_demo(document, tokens, output, session.data_dir))


@config_app.command("show")
def config_show(ctx: typer.Context, config: ConfigFile = None, settings: Settings = None) -> None:
    """The effective configuration, and where each value comes from."""
    from .kvstore.config import render
    from .kvstore.config import settings as listed

    session = session_of(ctx)
    found = configuration(ctx, config, settings)
    if not session.as_json:
        print(render(found), end="")
        return
    values = {
        name: {"value": str(value) if isinstance(value, Path) else value, "origin": origin}
        for name, value, origin in listed(found)
    }
    session.show({"settings": values}, lambda: ())


@app.command()
def version(ctx: typer.Context) -> None:
    """The version of this program."""
    session_of(ctx).show({"version": __version__}, lambda: [f"holdfast {__version__}"])


# Looking ---------------------------------------------------------------------------------------


@app.command()
def status(ctx: typer.Context) -> None:
    """The daemon at a glance; exit code 1 when it is not ready."""
    session = session_of(ctx)
    rest = session.rest()
    found = rest.get("/v1/status") | {"url": rest.url}

    def human() -> list[RenderableType]:
        from . import cli_tables
        from .cli_explain import quality

        return [cli_tables.status(found), "", cli_tables.tiers(found["tiers"]), "", quality(found["quality"])]

    session.show(found, human)
    if found["not_ready"] is not None:
        raise typer.Exit(FAILED)


@app.command()
def swaps(
    ctx: typer.Context,
    limit: Limit = 20,
    detail: Annotated[bool, typer.Option("--detail", help="Each in full: its hops, and why its strategy.")] = False,
) -> None:
    """Receipts of attaches: where bytes came from, and how long it took."""
    table = "swap_details" if detail else "swaps"
    listing(ctx, "swaps", {"limit": str(limit)}, table, "no document was attached yet")


@app.command()
def verdicts(ctx: typer.Context, limit: Limit = 20) -> None:
    """What was evicted, and why."""
    listing(ctx, "evictions", {"limit": str(limit)}, "verdicts", "nothing was evicted yet")


def listing(ctx: typer.Context, name: str, query: dict[str, str], table: str, nothing: str) -> None:
    """Ask for a list under /v1 and show it."""
    session = session_of(ctx)
    found = session.rest().get(f"/v1/{name}", query)

    def human() -> list[RenderableType]:
        from . import cli_tables

        return [getattr(cli_tables, table)(found[name])] if found[name] else [nothing]

    session.show(found, human)


@doc_app.command("ls")
def doc_ls(
    ctx: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    tier: Annotated[TierName | None, typer.Option(help="Only those with bytes in this tier.")] = None,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--not-pinned", help="Only pinned ones, or only others.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many at most.")] = PAGE,
) -> None:
    """Documents and where their KV is."""
    session = session_of(ctx)
    rest = session.rest()
    query = {"tenant": tenant, "tier": tier, "pinned": None if pinned is None else str(pinned).lower()}
    given = {key: value for key, value in query.items() if value is not None}
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None and len(found) < limit:
        page = {"limit": str(min(PAGE, limit - len(found)))} | ({"cursor": cursor} if cursor else {})
        answer = rest.get("/v1/documents", given | page)
        found += answer["documents"]
        cursor = answer["next_cursor"]

    def human() -> list[RenderableType]:
        from . import cli_tables

        return [cli_tables.documents(found)] if found else ["no documents"]

    session.show({"documents": found, "next_cursor": cursor}, human)
    if cursor is not None and not session.as_json:
        print(f"there are more than {limit}; see --limit", file=sys.stderr)


@doc_app.command("show")
def doc_show(ctx: typer.Context, name: Name) -> None:
    """One document, extent by extent."""
    from .rest import document_path

    session = session_of(ctx)
    found = session.rest().get(f"/v1/documents/{document_path(*split(name))}")

    def human() -> list[RenderableType]:
        from . import cli_tables

        return [cli_tables.document(found["document"]), "", cli_tables.extents(found["extents"])]

    session.show(found, human)


# Changing --------------------------------------------------------------------------------------


@doc_app.command("rm")
def doc_rm(ctx: typer.Context, name: Name) -> None:
    """Forget a document, and the KV that no other document needs."""
    from .rest import document_path

    session = session_of(ctx)
    tenant, document = split(name)
    session.rest().delete(f"/v1/documents/{document_path(tenant, document)}")
    session.show({"tenant": tenant, "document": document, "state": "deleted"}, lambda: [f"{tenant}/{document} deleted"])


@doc_app.command("ttl")
def doc_ttl(
    ctx: typer.Context,
    name: Name,
    ttl: Annotated[str, typer.Argument(metavar="DURATION", help='From now: 90s, 30m, 1h, 2d or "never".')],
) -> None:
    """Let a document be deleted after a time, or never. Leases and pins on it may last longer."""
    from .rest import document_path

    session = session_of(ctx)
    tenant, document = split(name)
    found = session.rest().patch(f"/v1/documents/{document_path(tenant, document)}", {"ttl_seconds": seconds(ttl)})

    def human() -> list[RenderableType]:
        from .cli_tables import moment

        until = found["document"]["expires_wall_ns"]
        return [f"{tenant}/{document} ends {moment(until)}" if until is not None else f"{tenant}/{document} has no end"]

    session.show(found, human)


@app.command()
def check(
    ctx: typer.Context,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be without losing good data.")] = False,
    data: Annotated[bool, typer.Option("--data", help="Read every extent on NVMe and compare its seals.")] = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Audit catalog, slabs, segment files and leases; exit code 1 when anything worse than a note remains."""
    from .cli_check import run_check
    from .kvstore.check import Wish

    session = session_of(ctx)
    found = configuration(ctx, config, settings)
    raise typer.Exit(run_check(session, found, Wish(fix=fix, data=data)))


def main() -> None:
    """Entry point of the `holdfast` program."""
    app()
