"""Inspector: gathers the facts of an audit from disk, reads what it is told to read, and repairs where no daemon runs.

Looking changes nothing and, beside a running daemon, holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from .arena import SLAB_NAME
from .audit import Facts, SlabFile, StoredExtent
from .backing import slab_directories
from .catalog import Catalog, Rows, inspect
from .config import Config
from .errors import CorruptExtent, InvalidRequest, StorageFailed
from .extent import ExtentId
from .findings import Commit, Finding, Forget, Remove
from .geometry import extent_geometry
from .orders import DropExtent, Record
from .ownership import OWNER_NAME
from .segments import PROBE_NAME, SEGMENT_NAME, Segments
from .verify import verify

CATALOG_NAME = "catalog.sqlite"
ADDRESS_NAME = "rest.json"

Progress = Callable[[int], None]  # hears the bytes of each extent that was read


def catalog_path(config: Config) -> Path:
    """The catalog of the data directory. Raises InvalidRequest where there is none."""
    path = config.daemon.data_dir / CATALOG_NAME
    if not path.is_file():
        raise InvalidRequest(f"{config.daemon.data_dir} has no {CATALOG_NAME}; say where the data is with --data-dir")
    return path


def gather(config: Config, present: Collection[ExtentId] | None = None) -> Facts:
    """What is on disk. `present`: what the running daemon has copies of; None when none runs.

    Raises StorageFailed when catalog or directories cannot be read, InvalidRequest when there is no catalog.
    """
    rows: Rows = inspect(catalog_path(config))  # before the files, for a row is written after its file is made
    foreign: list[str] = []
    segments: dict[int, int] = {}
    for path in _entries(config.nvme.directory):
        named = SEGMENT_NAME.fullmatch(path.name)
        if named:
            segments[int(named[1])] = _size(path)
        elif (
            path.name not in {PROBE_NAME, OWNER_NAME, "lost+found"} and config.nvme.directory != config.daemon.data_dir
        ):
            foreign.append(str(path))
    slabs = []
    for path in (path for directory in slab_directories(config) for path in _entries(directory)):
        if SLAB_NAME.fullmatch(path.name):
            _, number, serial = path.name.split("-")
            slabs.append(SlabFile(int(number), int(serial), str(path)))
    address = config.daemon.data_dir / ADDRESS_NAME
    return Facts(
        integrity=rows.integrity,
        unreadable=rows.unreadable,
        specs={spec.fingerprint(): spec for spec in rows.specs},
        extents=rows.extents,
        documents=rows.documents,
        pins=rows.pins,
        nvme_directory=str(config.nvme.directory),
        segment_bytes=config.nvme.segment_bytes,
        segment_count=config.nvme.capacity_bytes // config.nvme.segment_bytes,
        segments=segments,
        slabs=tuple(slabs),
        slab_count=config.ddr.capacity_bytes // config.ddr.slab_bytes,
        foreign=tuple(foreign),
        stale_address=str(address) if present is None and address.exists() else None,
        stale_socket=str(config.daemon.socket) if present is None and config.daemon.socket.exists() else None,
        present=present,
    )


def _entries(directory: Path) -> list[Path]:
    """What lies in a directory; nothing where there is none."""
    try:
        return sorted(directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise StorageFailed(f"{directory}: {error.strerror}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed since it was listed
        return 0
    except OSError as error:
        raise StorageFailed(f"{path}: {error.strerror}") from error


# Reading ---------------------------------------------------------------------------------------


def with_damage(config: Config, facts: Facts, rows: Sequence[StoredExtent], progress: Progress) -> Facts:
    """The facts, and what reading these rows' extents finds. `config.nvme.threads` read at a time."""
    if not rows:
        return facts
    largest = max(config.nvme.segment_bytes, *facts.segments.values())
    segments = Segments(config.nvme.directory, largest)
    damage: dict[ExtentId, str] = {}
    failed: dict[ExtentId, str] = {}

    def read(row: StoredExtent) -> None:
        geometry = extent_geometry(facts.specs[row.extent.fingerprint], row.extent.group)
        try:
            verify(segments, row.slot, geometry, row.seal)
        except CorruptExtent as error:
            damage[row.extent.id] = error.message
        except StorageFailed as error:
            failed[row.extent.id] = error.message
        progress(row.slot.size_bytes)

    try:
        with ThreadPoolExecutor(config.nvme.threads) as readers:
            for _ in readers.map(read, rows):
                pass
    finally:
        segments.close()
    return replace(facts, damage=damage, failed=failed)


# Repairing, where no daemon runs -----------------------------------------------------------------


def repair(config: Config, findings: Iterable[Finding]) -> list[Finding]:
    """Carry out what can be repaired; returns those findings that were. Raises StorageFailed."""
    chosen = [finding for finding in findings if finding.repair is not None]
    records: list[Record] = []
    for finding in chosen:
        match finding.repair:
            case Commit(record=record):
                records.append(record)
            case Forget(extent=extent):
                records.append(DropExtent(extent))
    if records:
        catalog = Catalog(catalog_path(config))
        try:
            catalog.commit(records)
        finally:
            catalog.close()
    for finding in chosen:
        if isinstance(finding.repair, Remove):
            remove(finding.repair.path)
    return chosen


def remove(path: str) -> None:
    """Delete a file. Raises StorageFailed."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"{path}: {error.strerror}") from error
