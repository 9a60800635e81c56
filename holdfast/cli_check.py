"""`holdfast check`: audits a data directory itself, or asks the daemon that owns it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from .cli_session import FAILED, Session
from .kvstore.config import Config
from .kvstore.errors import DataDirectoryBusy

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from .kvstore.check import Wish
    from .rest import Rest

POLL_SECONDS: Final = 0.2


def run_check(session: Session, config: Config, wish: Wish) -> int:
    """Check, show what was found, and return the exit code: 0 when nothing worse than a note remains."""
    found = _found(session, config, wish)
    session.show(found, lambda: _shown(found, wish))
    return 0 if found["clean"] else FAILED


def _found(session: Session, config: Config, wish: Wish) -> dict[str, Any]:
    if session.names_daemon:
        return _ask(session, session.rest(), wish)
    import msgspec

    from .kvstore.check import check
    from .kvstore.check_view import CheckView
    from .kvstore.clock import SystemClock
    from .kvstore.daemon import DataDirectory
    from .kvstore.inspector import catalog_path
    from .rest import Rest, left_address

    catalog_path(config)
    try:
        directory = DataDirectory(config.daemon.data_dir)
    except DataDirectoryBusy:
        return _ask(session, Rest(left_address(config.daemon.data_dir)), wish)
    try:
        with _progress(session) as progress:
            report = check(config, SystemClock(), wish, progress)
    finally:
        directory.close()
    shown: dict[str, Any] = msgspec.to_builtins(CheckView.of(report))
    return shown | {"data_dir": str(config.daemon.data_dir), "daemon": None}


def _ask(session: Session, rest: Rest, wish: Wish) -> dict[str, Any]:
    """Let the daemon check itself, and follow it."""
    found = rest.post("/v1/check", {"fix": wish.fix, "data": wish.data})
    with _progress(session) as progress:
        while found["state"] == "running":
            progress(found["read_bytes"], found["total_bytes"])
            time.sleep(POLL_SECONDS)
            found = rest.get("/v1/check")
    return found | {"data_dir": None, "daemon": rest.url}


@contextmanager
def _progress(session: Session) -> Iterator[Callable[[int, int], None]]:
    """A bar and a rate on a terminal's stderr while bytes are read; nothing elsewhere."""
    if session.as_json or not sys.stderr.isatty():
        yield lambda _, __: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True, no_color=not session.color)
    with Progress("reading", *columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda read, total: bar.update(task, completed=read, total=total)


def _shown(found: dict[str, Any], wish: Wish) -> list[RenderableType]:
    from .cli_tables import duration, size, table

    lines: list[RenderableType] = []
    if found["findings"]:
        columns = ("SEVERITY", "CODE", "WHAT", "STATE", "ADVICE")
        rows = [
            (f["severity"], f["code"], f["subject"], f["detail"], f"fixed: {f['fix']}" if f["fixed"] else _advice(f))
            for f in found["findings"]
        ]
        lines += [table(columns, rows), ""]
    counts = {name: sum(f["severity"] == name for f in found["remaining"]) for name in ("error", "warning", "note")}
    said = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count) or "nothing"
    where = found["daemon"] or found["data_dir"]
    read = f", {size(found['read_bytes'])} read" if found["read_bytes"] else ""
    lines.append(
        f"{where}: {found['documents']} documents, {found['extents']} extents{read} "
        f"in {duration(found['elapsed_seconds'])}; {said} {'remains' if wish.fix else 'found'}"
    )
    return lines


def _advice(finding: dict[str, Any]) -> str:
    fix = f" (--fix: {finding['fix']})" if finding["fix"] else ""
    return f"{finding['cause']}; {finding['advice']}{fix}"
