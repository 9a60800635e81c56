"""Durable means: what the daemon called durable is there after a power loss, as far as fsync goes.

A daemon records every system call below the NVMe tier and a copy of the catalog at every commit. A power loss keeps of
each file what was synced, and of what was not any part. Every instant of the recording is tried.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing

import pytest
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.check import Wish, check
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.config import load_config
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.orders import PutDocument, PutExtent

from daemon_process import DaemonProcess, durable, expected, fetch, put, until
from daemon_records import Record, trace
from fakes import EXTENT_BYTES

TOKENS = 72
SECTOR = 512


@pytest.fixture(scope="module")
def recording():
    """A daemon that wrote documents through, demoted one, deleted one and used its slots again."""
    with DaemonProcess(nvme__threads="1") as daemon:
        client = daemon.start(Record(daemon.directory)).client()
        for name in ("one", "two"):
            put(client, name, TOKENS)
            until(lambda name=name: durable(client, name), "it is durable")
        put(client, "back", TOKENS, WritePolicy.BACK)
        client.free("back")
        client.delete("one")
        put(client, "three", 320)
        until(lambda: durable(client, "three") and durable(client, "back"), "all are durable")
        assert daemon.stop() == 0
        yield daemon, trace(daemon.directory)


class Disk:
    """What a power loss leaves of the files: their synced bytes, and of the others what luck decides."""

    def __init__(self):
        self.kept: dict[str, bytearray] = {}
        self.loose: dict[str, list[tuple[int, bytes]]] = {}
        self.syncing: dict[str, int] = {}
        self.entries: set[str] = set()  # files whose directory entry was synced
        self.commit = None

    def take(self, event) -> None:
        match event:
            case ("fallocate", name, size):
                self.kept.setdefault(name, bytearray()).extend(bytes(size - len(self.kept[name])))
            case ("pwrite", name, offset, data):
                self.loose.setdefault(name, []).append((offset, data))
            case ("sync begins", name):
                self.syncing[name] = len(self.loose.get(name, ()))
            case ("sync", name):
                for offset, data in self.loose.get(name, [])[: self.syncing[name]]:
                    self.kept[name][offset : offset + len(data)] = data
                self.loose[name] = self.loose.get(name, [])[self.syncing[name] :]
            case ("fsync", "nvme"):
                self.entries |= set(self.kept)
            case ("commit", number):
                self.commit = number

    def write(self, daemon, directory, luck: random.Random) -> None:
        """Make the data directory as it is found when the power is back."""
        nvme = directory / "nvme"
        nvme.mkdir(parents=True)
        if self.commit is not None:
            for path in (daemon.directory / "commits" / str(self.commit)).iterdir():
                shutil.copy(path, directory)
        for name in self.entries:
            content = bytearray(self.kept[name])
            for offset, data in self.loose.get(name, ()):
                for start in range(0, len(data), SECTOR):
                    if luck.random() < 0.5:
                        content[offset + start : offset + start + SECTOR] = data[start : start + SECTOR]
            (nvme / name).write_bytes(content)


def test_every_row_follows_the_sync_of_its_bytes(recording):
    """pwrite -> fdatasync -> commit of the extent's row -> commit of the document's row, and files before them."""
    _, events = recording
    clean: set[tuple[str, int]] = set()  # (file, offset of an extent) written and synced
    dirty: dict[tuple[str, int], str] = {}
    entries: set[str] = set()
    made: set[str] = set()
    rows: set[str] = set()
    puts = 0
    for event in events:
        match event:
            case ("fallocate", name, _):
                made.add(name)
            case ("fsync", "nvme"):
                entries |= made
            case ("pwrite", name, offset, _):
                slot = (name, offset // EXTENT_BYTES * EXTENT_BYTES)
                dirty[slot] = "written"
                clean.discard(slot)
            case ("sync begins", name):
                dirty |= {slot: "syncing" for slot in dirty if slot[0] == name}
            case ("sync", name):
                synced = {slot for slot, state in dirty.items() if slot[0] == name and state == "syncing"}
                clean |= synced
                dirty = {slot: state for slot, state in dirty.items() if slot not in synced}
            case ("commit begins", records):
                for record in records:
                    if isinstance(record, PutExtent):
                        name = f"segment-{record.slot.slab}"
                        assert name in entries, "its file's directory entry is not synced"
                        assert (name, record.slot.offset) in clean, "its bytes are not synced"
                        rows.add(record.extent.id)
                        puts += 1
                    if isinstance(record, PutDocument):
                        assert set(record.document.extents) <= rows, "a document before its extents"
    assert puts >= 3 + 3 + 3 + 10


def test_the_catalog_syncs_at_every_commit(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    assert catalog._database.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert catalog._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    catalog.close()


def settings_of(daemon, directory):
    return {**daemon.settings, "daemon.data_dir": str(directory), "daemon.socket": "/tmp/hf-power-loss.sock"}


def documents_of(directory):
    with closing(sqlite3.connect(f"file:{directory}/catalog.sqlite?mode=ro", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT name FROM documents")}


def test_after_a_power_loss_at_any_instant_every_row_is_good(recording, tmp_path):
    """All that the catalog names is bit-exact, and a document that had been durable is there whole."""
    daemon, events = recording
    disk, promised = Disk(), set()
    seen = 0
    for index, event in enumerate(events):
        disk.take(event)
        if event[0] == "commit begins":
            gone = {record.name for record in event[1] if type(record).__name__ == "DropDocument"}
            promised -= gone
        if event[0] == "commit":
            begun = next(e for e in reversed(events[:index]) if e[0] == "commit begins")
            promised |= {record.document.id.name for record in begun[1] if isinstance(record, PutDocument)}
        if disk.commit is None:
            continue
        directory = tmp_path / str(index)
        disk.write(daemon, directory, random.Random(index))
        config = load_config(None, {}, settings_of(daemon, directory))
        report = check(config, ManualClock(), Wish(fix=False, data=True), lambda *_: None)
        bad = [finding for finding in report.found if finding.severity.value != "note"]
        assert not bad, (index, event[:2], bad)
        assert promised <= documents_of(directory), (index, event[:2])
        holes = [finding.subject for finding in report.found if finding.code.value == "document-has-hole"]
        assert not holes
        seen += 1
        shutil.rmtree(directory)
    assert promised == {"two", "three", "back"}
    assert seen > 50


@pytest.mark.parametrize("moment", [0.35, 0.7, 1.0])
def test_a_daemon_starts_on_what_a_power_loss_left(recording, moment):
    origin, events = recording
    disk = Disk()
    for event in events[: int(len(events) * moment)]:
        disk.take(event)
    with DaemonProcess() as daemon:
        disk.write(origin, daemon.data_dir, random.Random(7))
        client = daemon.start().client()
        shown = client.documents()
        assert shown
        for document in shown:
            assert document.complete
            assert document.durable
            assert fetch(client, document.name) == expected(document.name, document.token_count)


def test_a_forgotten_sync_would_be_noticed(recording, tmp_path):
    """The same recording without its syncs loses bytes that rows promise: the test above can fail."""
    daemon, events = recording
    disk = Disk()
    for event in events:
        if event[0] not in ("sync begins", "sync"):
            disk.take(event)
    disk.write(daemon, tmp_path / "lost", random.Random(1))
    config = load_config(None, {}, settings_of(daemon, tmp_path / "lost"))
    report = check(config, ManualClock(), Wish(fix=False, data=True), lambda *_: None)
    assert "extent-corrupt" in {finding.code.value for finding in report.found}


def test_a_start_reads_no_kv(recording):
    """Recovery takes time with the catalog, not with the data: no segment is read before somebody asks."""
    origin, _ = recording
    with DaemonProcess() as daemon:
        shutil.copytree(origin.data_dir, daemon.data_dir)
        client = daemon.start(Record(daemon.directory)).client()
        assert len(client.documents()) == 3
        assert [event for event in trace(daemon.directory) if event[0] == "pread"] == []
        assert fetch(client, "two") == expected("two", TOKENS)
        assert [event for event in trace(daemon.directory) if event[0] == "pread"]
