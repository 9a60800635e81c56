"""Catalog: what must survive a restart, in one SQLite file (WAL, synced at every commit).

A transaction is there whole or not at all, at any instant of a crash. Recency never comes here: a commit costs a
millisecond or more. The warm index has the same form, in shared memory, where nothing is synced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from .audit import StoredExtent, Unreadable
from .bypass import Bypass
from .calibration import Calibration, RingRate
from .catalog_rows import (
    EXTENT_COLUMNS,
    READERS,
    Row,
    document_of,
    document_row,
    extent_of,
    extent_row,
    pin_of,
    pin_row,
    prefills_of,
    spec_of,
)
from .claims import Pin
from .document import Document
from .errors import InvalidSpec, StorageFailed
from .extent import Extent, ExtentId
from .keys import SECRET_BYTES
from .ledger import Wear
from .orders import (
    DropDocument,
    DropExtent,
    DropFence,
    DropPin,
    PutBypass,
    PutCalibration,
    PutDocument,
    PutExtent,
    PutFence,
    PutPin,
    PutPrefills,
    PutRings,
    PutSpec,
    PutWear,
    Record,
)
from .seal import CHECKSUM_BYTES
from .slots import Slot
from .spec import KVSpec

SCHEMA_VERSION: Final = 4
CALIBRATION: Final = "calibration"  # names in meta
RINGS: Final = "rings"
WEAR: Final = "wear"
BYPASS: Final = "bypass"
IDENTITY: Final = "identity"
META: Final = {PutBypass: BYPASS, PutCalibration: CALIBRATION, PutRings: RINGS, PutWear: WEAR}
SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE specs (fingerprint BLOB PRIMARY KEY, spec BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE tenants (name TEXT PRIMARY KEY, secret BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE extents (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    layer_group INTEGER NOT NULL,
    start INTEGER NOT NULL,
    valid_tokens INTEGER NOT NULL,
    previous TEXT,
    block_keys BLOB NOT NULL,
    slot_bytes INTEGER NOT NULL,
    checksums BLOB NOT NULL,
    segment INTEGER NOT NULL,
    segment_offset INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE documents (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    token_count INTEGER NOT NULL,
    extents BLOB NOT NULL,
    write_policy TEXT NOT NULL,
    created_wall_ns INTEGER NOT NULL,
    expires_wall_ns INTEGER,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE TABLE prefills (fingerprint BLOB PRIMARY KEY, points BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE pins (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    floor INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    owner TEXT NOT NULL,
    reason TEXT NOT NULL,
    created_wall_ns INTEGER NOT NULL,
    expires_wall_ns INTEGER,
    kind TEXT NOT NULL,
    ttl_ns INTEGER,
    refresh TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
"""

NOT_OURS: Final = (ValueError, TypeError, msgspec.MsgspecError, InvalidSpec)  # how a row that we did not write shows

FENCES: Final = """
CREATE TABLE fences (
    client INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    started INTEGER NOT NULL,
    serial INTEGER NOT NULL,
    PRIMARY KEY (client, serial)
) WITHOUT ROWID;
"""

Statement = tuple[str, Row]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Everything in the catalog but seals. `extents` come with their NVMe slot.

    `orphans` are the extents that no document needed (an ingest was interrupted): dropped, their slots are free.
    A document may name extents that are not in `extents`: they were evicted or quarantined.
    """

    specs: tuple[KVSpec, ...]
    extents: tuple[tuple[Extent, Slot], ...]
    documents: tuple[Document, ...]
    pins: tuple[Pin, ...]
    tenants: dict[str, bytes]
    prefills: tuple[PutPrefills, ...]
    calibration: Calibration | None
    rings: tuple[RingRate, ...]
    orphans: tuple[ExtentId, ...]
    wear: Wear
    bypass: Bypass | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Everything in the catalog, sound or not, for an audit. `unreadable` rows do not decode."""

    integrity: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]
    specs: tuple[KVSpec, ...]
    extents: tuple[StoredExtent, ...]
    documents: tuple[Document, ...]
    pins: tuple[Pin, ...]


def inspect(path: Path) -> Rows:
    """Read the file at one instant, on a connection of its own: whoever commits does not wait.

    What SQLite cannot make out is told in `integrity`. Raises StorageFailed when the file cannot be opened at all.
    """
    rows: dict[str, list[Any]] = {table: [] for table in READERS}
    unreadable: list[Unreadable] = []
    integrity: list[str] = []
    with _failures_of(path, "cannot be opened"):
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
    with contextlib.closing(database):
        try:
            database.execute("BEGIN")
            integrity += [str(row[0]) for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]
            for table, (columns, keys, decode, drop) in READERS.items():
                for row in database.execute(f"SELECT {columns} FROM {table}"):  # noqa: S608 - our own names
                    try:
                        rows[table].append(decode(row))
                    except NOT_OURS as error:
                        key = "/".join(v.hex() if isinstance(v, bytes) else str(v) for v in row[:keys])
                        unreadable.append(Unreadable(table, key, str(error), drop(row)))
        except sqlite3.DatabaseError as error:
            integrity.append(str(error))
    return Rows(
        integrity=tuple(integrity),
        unreadable=tuple(unreadable),
        **{table: tuple(found) for table, found in rows.items()},
    )


class Durability(StrEnum):
    """What a commit outlives. Either way it is whole or not there. The value is SQLite's."""

    POWER = "FULL"
    PROCESS = "OFF"  # the kernel has the writes, so that SIGKILL loses none; for the warm index


class Catalog:
    """The file at `path`, made when there is none. Calls from several threads wait for each other."""

    def __init__(self, path: Path, durability: Durability = Durability.POWER) -> None:
        """Raises StorageFailed when the file cannot be opened, is no catalog, or is of a newer version."""
        self.path = path
        self._durability = durability
        self._lock = threading.Lock()
        self._secrets: dict[str, bytes] = {}
        self._reading = threading.Lock()  # another connection, so that a read waits for no commit
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # It holds the tenants' secrets, and SQLite gives its companions the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StorageFailed(f"catalog {path}: {error.strerror}") from error
        with self._failures("cannot be opened"):
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with self._failures("cannot be opened"):
                mode = self._database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                if mode != "wal":
                    raise StorageFailed(f"catalog {path}: its file system has no shared memory; use a local one")
                self._database.execute(f"PRAGMA synchronous = {durability.value}")
                self._migrate()
        except StorageFailed:
            self._reader.close()
            self._database.close()
            raise

    def commit(self, records: Sequence[Record]) -> None:
        """Apply the records in order, all or none. Durable on return. Raises StorageFailed."""
        with self._lock, self._failures("commit failed"), self._transaction():
            for record in records:
                statement, values = _statement(record)
                self._database.execute(statement, values)

    def tenant_secret(self, name: str) -> bytes:
        """The 32 bytes that key the tenant's blocks; made, and durable on return, when new. Raises StorageFailed."""
        known = self._secrets.get(name)  # without the lock: the loop must not wait for a commit to end
        if known is not None:
            return known
        with self._lock, self._failures("reading a tenant's secret failed"):
            query = "SELECT secret FROM tenants WHERE name = ?"
            found = self._database.execute(query, (name,)).fetchone()
            if found is None:
                found = (secrets.token_bytes(SECRET_BYTES),)
                with self._transaction():
                    self._database.execute("INSERT INTO tenants VALUES (?, ?)", (name, found[0]))
            self._secrets[name] = bytes(found[0])
            return self._secrets[name]

    def seal(self, extent: ExtentId) -> bytes:
        """The seal of an extent's NVMe copy (see seal). Raises StorageFailed, also when there is no such row."""
        with self._reading, self._failures("reading a seal failed"):
            found = self._reader.execute("SELECT checksums FROM extents WHERE id = ?", (extent,)).fetchone()
        if found is None or not isinstance(found[0], bytes) or len(found[0]) % CHECKSUM_BYTES:
            raise StorageFailed(f"catalog {self.path} has no seal of extent {extent}")
        return found[0]

    def recall(self, name: str) -> str | None:
        """What was remembered under that name. Raises StorageFailed."""
        with self._lock, self._failures("cannot be read"):
            found = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            return None if found is None else str(found[0])

    def remember(self, name: str, value: str) -> None:
        """Keep one word about the whole file. Raises StorageFailed."""
        with self._lock, self._failures("commit failed"):
            self._database.execute(*_replace("meta", name, value))

    def identity(self) -> str:
        """What tells this catalog from any other; made when it is new. Raises StorageFailed."""
        found = self.recall(IDENTITY)
        if found is None:
            found = secrets.token_hex(16)
            self.remember(IDENTITY, found)
        return found

    def fences(self) -> list[PutFence]:
        """Every fence of a warm index. Raises StorageFailed."""
        with self._lock, self._failures("cannot be read"):
            return [PutFence(*row) for row in self._rows("*", "fences", "client, serial")]

    def load(self) -> Contents:
        """Everything, after dropping extents that no document needs. Raises StorageFailed."""
        found = self.look()
        needed = {extent for document in found.documents for extent in document.extents}
        orphans = tuple(extent.id for extent, _ in found.extents if extent.id not in needed)
        with self._lock, self._failures("cannot be written to"), self._transaction():
            self._database.executemany("DELETE FROM extents WHERE id = ?", [(orphan,) for orphan in orphans])
        extents = tuple(entry for entry in found.extents if entry[0].id in needed)
        return replace(found, extents=extents, orphans=orphans)

    def look(self) -> Contents:
        """Everything as it is: extents that no document needs are among `extents`. Raises StorageFailed."""
        with self._lock, self._failures("cannot be read"), self._ours(), self._transaction():
            return self._contents()

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """What is no row of ours as StorageFailed."""
        try:
            yield
        except NOT_OURS as error:
            raise StorageFailed(f"catalog {self.path} has a row that is not ours: {error}; restore it") from error

    def _contents(self) -> Contents:
        shared: dict[object, Any] = {}  # one object for equal values: a hundred thousand rows repeat a few

        def share(value: Any) -> Any:
            return shared.setdefault(value, value)

        documents = tuple(document_of(row, share) for row in self._rows("*", "documents", "tenant, name"))
        rows = self._rows(EXTENT_COLUMNS, "extents", "id")
        return Contents(
            specs=tuple(spec_of(row) for row in self._rows("*", "specs", "fingerprint")),
            extents=tuple(extent_of(tuple(map(share, row))) for row in rows),
            documents=documents,
            pins=tuple(pin_of(row) for row in self._rows("*", "pins", "tenant, name")),
            tenants={str(name): bytes(secret) for name, secret in self._rows("*", "tenants", "name")},
            prefills=tuple(prefills_of(row) for row in self._rows("*", "prefills", "fingerprint")),
            calibration=self._meta(CALIBRATION, Calibration),
            rings=self._rings(),
            wear=self._meta(WEAR, Wear) or Wear(),
            bypass=self._meta(BYPASS, Bypass),
            orphans=(),
        )

    def _meta(self, name: str, kind: type[T]) -> T | None:
        found = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return msgspec.json.decode(found[0], type=kind | None) if found is not None else None

    def measured(self) -> tuple[Calibration | None, tuple[RingRate, ...]]:
        """The newest calibration, and what groups were measured to do. Raises StorageFailed."""
        with self._lock, self._failures("cannot be read"), self._ours():
            return self._meta(CALIBRATION, Calibration), self._rings()

    def _rings(self) -> tuple[RingRate, ...]:
        return self._meta(RINGS, tuple[RingRate, ...]) or ()

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file; empty when it is sound. Reads all of it. Raises StorageFailed."""
        with self._lock, self._failures("cannot be checked"):
            found = [str(row[0]) for row in self._database.execute("PRAGMA integrity_check")]
            return [] if found == ["ok"] else found

    def close(self) -> None:
        """Close the file; what was committed stays."""
        with self._lock, self._failures("cannot be closed"):
            self._reader.close()
            self._database.close()

    def _migrate(self) -> None:
        """Make the tables of a new file; refuse what we do not know."""
        with self._transaction():
            tables = self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if not tables:
                schema = SCHEMA if self._durability is Durability.POWER else SCHEMA + FENCES
                for statement in schema.split(";"):
                    self._database.execute(statement)
                self._database.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
                return
            query = "SELECT value FROM meta WHERE name = 'schema_version'"
            version = self._database.execute(query).fetchone()
            if version is None or not str(version[0]).isdecimal():
                raise StorageFailed(f"catalog {self.path} names no schema version; it is not ours")
            if int(version[0]) != SCHEMA_VERSION:
                raise StorageFailed(
                    f"catalog {self.path} has schema version {version[0]}, this Holdfast knows {SCHEMA_VERSION}; "
                    "run the version that wrote it, or start with another data directory"
                )

    def _rows(self, columns: str, table: str, order: str) -> Iterator[Row]:
        yield from self._database.execute(f"SELECT {columns} FROM {table} ORDER BY {order}")  # noqa: S608 - our own names

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit, or change nothing."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _failures(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _failures_of(self.path, what)


@contextlib.contextmanager
def _failures_of(path: Path, what: str) -> Iterator[None]:
    """SQLite's errors as StorageFailed."""
    try:
        yield
    except sqlite3.Error as error:
        # The base class itself, not a child of it, is how a damaged or foreign file shows.
        advice = "; restore it or move it away" if type(error) is sqlite3.DatabaseError else ""
        raise StorageFailed(f"catalog {path} {what}: {error}{advice}") from error


def _statement(record: Record) -> Statement:
    """The SQL of one record. Put replaces; Drop of what is not there does nothing."""
    match record:
        case PutSpec(spec=spec):
            return _replace("specs", spec.fingerprint(), msgspec.json.encode(spec))
        case PutExtent(extent=extent, checksums=checksums, slot=slot):
            return _replace("extents", *extent_row(extent, checksums, slot))
        case PutDocument(document=document):
            return _replace("documents", *document_row(document))
        case PutPrefills(fingerprint=fingerprint, points=points):
            return _replace("prefills", fingerprint, msgspec.msgpack.encode(points))
        case PutBypass() | PutCalibration() | PutRings() | PutWear():
            name, value = META[type(record)], record[0]
            return _replace("meta", name, msgspec.json.encode(value).decode())
        case PutPin(pin=pin):
            return _replace("pins", *pin_row(pin))
        case DropExtent(extent=extent_id):
            return "DELETE FROM extents WHERE id = ?", (extent_id,)
        case DropDocument(tenant=tenant, name=name):
            return "DELETE FROM documents WHERE tenant = ? AND name = ?", (tenant, name)
        case PutFence() | DropFence():
            return _fence_statement(record)
        case DropPin(tenant=tenant, name=name):
            return "DELETE FROM pins WHERE tenant = ? AND name = ?", (tenant, name)


def _fence_statement(record: PutFence | DropFence) -> Statement:
    if isinstance(record, PutFence):
        return _replace("fences", record.client, record.pid, record.started, record.serial)
    return "DELETE FROM fences WHERE client = ?", (record.client,)


def _replace(table: str, *values: object) -> Statement:
    marks = ", ".join("?" * len(values))
    return f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values  # noqa: S608 - our own names
