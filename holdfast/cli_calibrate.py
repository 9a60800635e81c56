"""`holdfast calibrate`: measure, store, show. A running daemon takes the result over; else its catalog keeps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_runner import Device, Transport
from .cli_session import ConfigFile, Session, Settings, configuration, session_of
from .kvstore.errors import DaemonUnavailable, InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .kvstore.calibration import Calibration
    from .kvstore.catalog import Catalog
    from .kvstore.config import Config
    from .runner_plan import RunnerOptions


def calibrate(
    ctx: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often to measure; medians count.")] = 5,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; show what was measured last.")] = False,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead measure a group of ranks with this checkpoint.")
    ] = None,
    cp: Annotated[int, typer.Option(min=1, max=1024, help="Its context-parallel ranks.")] = 2,
    tp: Annotated[int, typer.Option(min=1, max=128, help="Its tensor-parallel ranks.")] = 1,
    device: Annotated[Device, typer.Option(help="Where they compute.")] = Device.CPU,
    threads: Annotated[int, typer.Option(min=0, help="Threads per rank; 0 shares the cores evenly.")] = 0,
    kernel: Annotated[str, typer.Option(help="Attention kernel; the best for the device by default.")] = "",
    communicator: Annotated[Transport, typer.Option(help="What they exchange KV over.")] = Transport.AUTO,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Measure this machine's memories and disks, so that predictions are of it; or what a group's ranks do together."""
    session = session_of(ctx)
    found = configuration(ctx, config, settings)
    if show:
        show_stored(session, found)
    elif model is None:
        measure_and_show(session, found, rounds)
    else:
        from .runner_plan import RunnerOptions

        options = RunnerOptions(
            model=model,
            cp=cp,
            tp=tp,
            device=device,
            name="calibrate",
            tenant="default",
            rows=None,
            hbm_bytes=None,
            threads=threads,
            kernel=kernel,
            communicator=communicator,
        )
        measure_group_and_show(session, found, options)


def measure_group_and_show(session: Session, config: Config, options: RunnerOptions) -> None:
    """Measure a group, and show what the daemon keeps of it. Raises HoldfastError."""
    import msgspec

    from .calibrate_group import calibrate_group

    measured = calibrate_group(options, config, lambda step: note(session, step))
    found = msgspec.to_builtins({"rings": [measured.rate] if measured.rate else [], "prefills": measured.prefills})

    def human() -> Sequence[RenderableType]:
        from . import cli_tables

        rings: list[RenderableType] = [cli_tables.rings(found["rings"]), ""] if found["rings"] else []
        return [*rings, cli_tables.prefills(found["prefills"])]

    session.show(found, human)


def note(session: Session, step: str) -> None:
    """Say on a terminal what goes on."""
    if not session.as_json and sys.stderr.isatty():
        print(f"\r\033[K{step}", end="", file=sys.stderr, flush=True)


def measure_and_show(session: Session, config: Config, rounds: int) -> None:
    """Measure this machine, store the result and show it. Raises HoldfastError."""
    from .calibrate import calibrate as measure
    from .kvstore.backing import arena_directory
    from .kvstore.clock import SystemClock
    from .kvstore.machine import Machine

    if session.url is not None:
        raise InvalidRequest("calibrate measures the machine it runs on; run it beside the daemon, with --data-dir")

    directory = arena_directory(config, Machine())
    measured = measure(config, directory, SystemClock(), rounds, lambda step: note(session, step))
    note(session, "")
    show(session, stored(config, measured))


def show_stored(session: Session, config: Config) -> None:
    """Show what was measured before, and how well it predicts. Raises HoldfastError."""
    try:
        found = session.rest().get("/v1/calibration")
    except DaemonUnavailable:
        if session.url is not None:
            raise
        found = _from_catalog(config)
    show(session, found)


def stored(config: Config, measured: Calibration) -> dict[str, Any]:
    """Give it to the daemon of that data directory, or to its catalog where none runs."""
    import msgspec

    from .kvstore.orders import PutCalibration
    from .rest import Rest, left_address

    try:
        address = left_address(config.daemon.data_dir)
        return Rest(address).post("/v1/calibration", msgspec.to_builtins(measured))
    except DaemonUnavailable:
        with _catalog(config) as catalog:
            catalog.commit([PutCalibration(measured)])
            return _said(catalog)


def _from_catalog(config: Config) -> dict[str, Any]:
    if not (config.daemon.data_dir / "catalog.sqlite").exists():
        return {"calibration": None, "rings": []}
    with _catalog(config) as catalog:
        return _said(catalog)


@contextmanager
def _catalog(config: Config) -> Iterator[Catalog]:
    """The catalog of a data directory that no daemon has."""
    from .kvstore.catalog import Catalog
    from .kvstore.daemon import DataDirectory

    path = config.daemon.data_dir
    with closing(DataDirectory(path)), closing(Catalog(path / "catalog.sqlite")) as catalog:
        yield catalog


def _said(catalog: Catalog) -> dict[str, Any]:
    """What the catalog keeps, as /v1/calibration says it."""
    import msgspec

    calibration, rings = catalog.measured()
    found = msgspec.to_builtins({"calibration": calibration, "rings": rings[::-1]})
    assert isinstance(found, dict)
    return found


def show(session: Session, found: dict[str, Any]) -> None:
    """Print an answer of /v1/calibration, or what the catalog had."""

    def human() -> Sequence[RenderableType]:
        from . import cli_tables

        said: list[RenderableType] = [
            "not calibrated yet: run `holdfast calibrate`; until then predictions use typical figures"
        ]
        if found["calibration"] is not None:
            said = cli_tables.calibration(found)
        return [*said, "", cli_tables.rings(found["rings"])] if found["rings"] else said

    session.show(found, human)
