"""`holdfast calibrate`: measure, store, show. A running daemon takes the result over; else its catalog keeps it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .cli_session import Session
from .kvstore.calibration import Calibration
from .kvstore.config import Config
from .kvstore.errors import DaemonUnavailable, InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        found = {"calibration": _from_catalog(config)}
    show(session, found)


def stored(config: Config, measured: Calibration) -> dict[str, Any]:
    """Give it to the daemon of that data directory, or to its catalog where none runs."""
    from .rest import Rest, left_address

    try:
        address = left_address(config.daemon.data_dir)
        return Rest(address).post("/v1/calibration", _json(measured))
    except DaemonUnavailable:
        _to_catalog(config, measured)
        return {"calibration": _json(measured)}


def _to_catalog(config: Config, measured: Calibration) -> None:
    from .kvstore.catalog import Catalog
    from .kvstore.daemon import DataDirectory
    from .kvstore.orders import PutCalibration

    directory = DataDirectory(config.daemon.data_dir)
    try:
        catalog = Catalog(config.daemon.data_dir / "catalog.sqlite")
        try:
            catalog.commit([PutCalibration(measured)])
        finally:
            catalog.close()
    finally:
        directory.close()


def _from_catalog(config: Config) -> dict[str, Any] | None:
    from .kvstore.catalog import Catalog
    from .kvstore.daemon import DataDirectory

    if not (config.daemon.data_dir / "catalog.sqlite").exists():
        return None
    directory = DataDirectory(config.daemon.data_dir)
    try:
        catalog = Catalog(config.daemon.data_dir / "catalog.sqlite")
        try:
            found = catalog.calibration()
        finally:
            catalog.close()
    finally:
        directory.close()
    return _json(found) if found is not None else None


def _json(calibration: Calibration) -> dict[str, Any]:
    found = msgspec.to_builtins(calibration)
    assert isinstance(found, dict)
    return found


def show(session: Session, found: dict[str, Any]) -> None:
    """Print an answer of /v1/calibration, or what the catalog had."""

    def human() -> Sequence[RenderableType]:
        from . import cli_tables

        if found["calibration"] is None:
            return ["not calibrated yet: run `holdfast calibrate`; until then predictions use typical figures"]
        return cli_tables.calibration(found)

    session.show(found, human)
