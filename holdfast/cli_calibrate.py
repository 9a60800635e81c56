"""`holdfast calibrate`: measure, store, show. A running daemon takes the result over; else its catalog keeps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from .cli_session import Session
from .kvstore.calibration import Calibration
from .kvstore.config import Config
from .kvstore.errors import DaemonUnavailable, InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .kvstore.catalog import Catalog


def measure_and_show(session: Session, config: Config, rounds: int) -> None:
    """Measure this machine, store the result and show it. Raises HoldfastError."""
    from .calibrate import calibrate
    from .kvstore.backing import arena_directory
    from .kvstore.clock import SystemClock
    from .kvstore.machine import Machine

    if session.url is not None:
        raise InvalidRequest("calibrate measures the machine it runs on; run it beside the daemon, with --data-dir")

    def progress(step: str) -> None:
        if not session.as_json and sys.stderr.isatty():
            print(f"\r\033[K{step}", end="", file=sys.stderr, flush=True)

    directory = arena_directory(config, Machine())
    measured = calibrate(config, directory, SystemClock(), rounds, progress)
    progress("")
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
