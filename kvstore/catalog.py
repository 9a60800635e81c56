"""Catalog: what must survive a restart, in one SQLite file (WAL, synced at every commit).

A transaction is there whole or not at all, at any instant of a crash. Recency never comes here: a commit costs a
millisecond or more.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from .audit import StoredExtent, Unreadable
from .calibration import Calibration
from .claims import Pin
from .document import Document, DocumentId, WritePolicy
from .errors import InvalidSpec, StorageFailed
from .extent import Extent, ExtentId
from .keys import KEY_BYTES, SECRET_BYTES
from .orders import (
    DropDocument,
    DropExtent,
    DropPin,
    PutCalibration,
    PutDocument,
    PutExtent,
    PutPin,
    PutPrefills,
    PutSpec,
    Record,
)
from .residency import Tier
from .seal import CHECKSUM_BYTES
from .slots import Slot
from .spec import KVSpec

SCHEMA_VERSION: Final = 2
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
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
"""

EXTENT_COLUMNS: Final = """id, tenant, fingerprint, layer_group, start, valid_tokens, previous, block_keys, slot_bytes,
    segment, segment_offset"""  # all but the seal, which is read when it is needed
NOT_OURS: Final = (ValueError, TypeError, msgspec.MsgspecError, InvalidSpec)  # how a row that we did not write shows

Row = tuple[Any, ...]  # what SQLite gives and takes: one value per column
Statement = tuple[str, Row]


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
    orphans: tuple[ExtentId, ...]


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
    rows: dict[str, list[Any]] = {table: [] for table in _READERS}
    unreadable: list[Unreadable] = []
    integrity: list[str] = []
    with _failures_of(path, "cannot be opened"):
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
    with contextlib.closing(database):
        try:
            database.execute("BEGIN")
            integrity += [str(row[0]) for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]
            for table, (columns, keys, decode, drop) in _READERS.items():
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


class Catalog:
    """The file at `path`, made when there is none. Calls from several threads wait for each other."""

    def __init__(self, path: Path) -> None:
        """Raises StorageFailed when the file cannot be opened, is no catalog, or is of a newer version."""
        self.path = path
        self._lock = threading.Lock()
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
                self._database.execute("PRAGMA synchronous = FULL")
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
        with self._lock, self._failures("reading a tenant's secret failed"):
            query = "SELECT secret FROM tenants WHERE name = ?"
            found = self._database.execute(query, (name,)).fetchone()
            if found is None:
                found = (secrets.token_bytes(SECRET_BYTES),)
                with self._transaction():
                    self._database.execute("INSERT INTO tenants VALUES (?, ?)", (name, found[0]))
            return bytes(found[0])

    def seal(self, extent: ExtentId) -> bytes:
        """The seal of an extent's NVMe copy (see seal). Raises StorageFailed, also when there is no such row."""
        with self._reading, self._failures("reading a seal failed"):
            found = self._reader.execute("SELECT checksums FROM extents WHERE id = ?", (extent,)).fetchone()
        if found is None or not isinstance(found[0], bytes) or len(found[0]) % CHECKSUM_BYTES:
            raise StorageFailed(f"catalog {self.path} has no seal of extent {extent}")
        return found[0]

    def load(self) -> Contents:
        """Everything, after dropping extents that no document needs. Raises StorageFailed."""
        with self._lock, self._failures("cannot be read"), self._transaction():
            try:
                return self._contents()
            except NOT_OURS as error:
                raise StorageFailed(f"catalog {self.path} has a row that is not ours: {error}; restore it") from error

    def _contents(self) -> Contents:
        shared: dict[object, Any] = {}  # one object for equal values: a hundred thousand rows repeat a few

        def share(value: Any) -> Any:
            return shared.setdefault(value, value)

        documents = tuple(_document(row, share) for row in self._rows("*", "documents", "tenant, name"))
        needed = {extent for document in documents for extent in document.extents}
        rows = self._rows(EXTENT_COLUMNS, "extents", "id")
        extents = [_extent(tuple(map(share, row))) for row in rows]
        orphans = tuple(extent.id for extent, _ in extents if extent.id not in needed)
        self._database.executemany("DELETE FROM extents WHERE id = ?", [(orphan,) for orphan in orphans])
        return Contents(
            specs=tuple(_spec(row) for row in self._rows("*", "specs", "fingerprint")),
            extents=tuple(entry for entry in extents if entry[0].id in needed),
            documents=documents,
            pins=tuple(_pin(row) for row in self._rows("*", "pins", "tenant, name")),
            tenants={str(name): bytes(secret) for name, secret in self._rows("*", "tenants", "name")},
            prefills=tuple(_prefills(row) for row in self._rows("*", "prefills", "fingerprint")),
            calibration=self._calibration(),
            orphans=orphans,
        )

    def _calibration(self) -> Calibration | None:
        found = self._database.execute("SELECT value FROM meta WHERE name = 'calibration'").fetchone()
        return msgspec.json.decode(found[0], type=Calibration) if found is not None else None

    def calibration(self) -> Calibration | None:
        """The newest calibration. Raises StorageFailed."""
        with self._lock, self._failures("cannot be read"):
            return self._calibration()

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
                for statement in SCHEMA.split(";"):
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
            return _replace("extents", *_extent_row(extent, checksums, slot))
        case PutDocument(document=document):
            return _replace("documents", *_document_row(document))
        case PutPrefills(fingerprint=fingerprint, points=points):
            return _replace("prefills", fingerprint, msgspec.msgpack.encode(points))
        case PutCalibration(calibration=calibration):
            return _replace("meta", "calibration", msgspec.json.encode(calibration).decode())
        case PutPin(pin=pin):
            return _replace("pins", *_pin_row(pin))
        case DropExtent(extent=extent_id):
            return "DELETE FROM extents WHERE id = ?", (extent_id,)
        case DropDocument(tenant=tenant, name=name):
            return "DELETE FROM documents WHERE tenant = ? AND name = ?", (tenant, name)
        case DropPin(tenant=tenant, name=name):
            return "DELETE FROM pins WHERE tenant = ? AND name = ?", (tenant, name)


def _replace(table: str, *values: object) -> Statement:
    marks = ", ".join("?" * len(values))
    return f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values  # noqa: S608 - our own names


# Rows, in the order of the tables' columns, and back.


def _spec(row: Row) -> KVSpec:
    fingerprint, text = row
    spec = msgspec.json.decode(text, type=KVSpec)
    if spec.fingerprint() != fingerprint:
        raise ValueError(f"the spec of {spec.model!r} has another fingerprint")
    return spec


def _prefills(row: Row) -> PutPrefills:
    fingerprint, points = row
    return PutPrefills(bytes(fingerprint), msgspec.msgpack.decode(points, type=tuple[tuple[int, int, float], ...]))


def _extent_row(extent: Extent, checksums: bytes, slot: Slot) -> Row:
    assert slot.size_bytes == extent.slot_bytes, "an extent fills its slot"
    return (
        extent.id,
        extent.tenant,
        extent.fingerprint,
        extent.group,
        extent.start,
        extent.valid_tokens,
        extent.previous,
        extent.block_keys,
        extent.slot_bytes,
        checksums,
        slot.slab,
        slot.offset,
    )


def _extent(row: Row) -> tuple[Extent, Slot]:
    *identity, keys, slot_bytes, segment, offset = row
    extent_id, tenant, fingerprint, group, start, valid_tokens, previous = identity
    if not isinstance(keys, bytes) or len(keys) % KEY_BYTES:
        raise ValueError(f"extent {extent_id} has no block keys")
    extent = Extent(
        id=extent_id,
        tenant=tenant,
        fingerprint=fingerprint,
        group=group,
        start=start,
        valid_tokens=valid_tokens,
        previous=previous,
        block_keys=keys,
        slot_bytes=slot_bytes,
    )
    return extent, Slot(segment, offset, slot_bytes)


def _document_row(document: Document) -> Row:
    return (
        document.id.tenant,
        document.id.name,
        document.fingerprint,
        document.token_count,
        msgspec.msgpack.encode(document.extents),
        document.write_policy.value,
        document.created_wall_ns,
    )


def _document(row: Row, share: Callable[[str], str]) -> Document:
    tenant, name, fingerprint, token_count, extents, write_policy, created_wall_ns = row
    return Document(
        id=DocumentId(tenant, name),
        fingerprint=fingerprint,
        token_count=token_count,
        extents=tuple(map(share, msgspec.msgpack.decode(extents, type=tuple[str, ...]))),
        write_policy=WritePolicy(write_policy),
        created_wall_ns=created_wall_ns,
    )


def _pin_row(pin: Pin) -> Row:
    return (
        pin.document.tenant,
        pin.document.name,
        int(pin.floor),
        pin.size_bytes,
        pin.owner,
        pin.reason,
        pin.created_wall_ns,
        pin.expires_wall_ns,
    )


def _pin(row: Row) -> Pin:
    tenant, name, floor, size_bytes, owner, reason, created_wall_ns, expires_wall_ns = row
    return Pin(
        document=DocumentId(tenant, name),
        floor=Tier(floor),
        size_bytes=size_bytes,
        owner=owner,
        reason=reason,
        created_wall_ns=created_wall_ns,
        expires_wall_ns=expires_wall_ns,
    )


def _stored(row: Row) -> StoredExtent:
    *columns, seal = row
    extent, slot = _extent(tuple(columns))
    numbers = (*slot, extent.group, extent.start, extent.valid_tokens)
    if any(not isinstance(n, int) for n in numbers) or slot.size_bytes < 1:  # SQLite keeps any type in any column
        raise ValueError("a column holds a value of another type")
    if not isinstance(seal, bytes) or len(seal) % CHECKSUM_BYTES:
        raise ValueError(f"extent {extent.id} has no seal")
    return StoredExtent(extent, seal, slot)


# For an audit: a table's columns, how many of them are its key, how a row is read, what drops it (if it may be lost).
_READERS: Final[dict[str, tuple[str, int, Callable[[Row], object], Callable[[Row], Record | None]]]] = {
    "specs": ("*", 1, _spec, lambda _: None),
    "extents": (f"{EXTENT_COLUMNS}, checksums", 1, _stored, lambda row: DropExtent(row[0])),
    "documents": ("*", 2, lambda row: _document(row, str), lambda _: None),
    "pins": ("*", 2, _pin, lambda row: DropPin(row[0], row[1])),
}
