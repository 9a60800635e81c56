"""`holdfast check` on a directory without a daemon: each kind of damage is planted, found, repaired, and gone.

The directory is made once, by a real daemon, and copied for every test.
"""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from holdfast.kvstore.audit import Facts, StoredExtent, audit, overlapping, readable
from holdfast.kvstore.backing import arena_directory
from holdfast.kvstore.check import Wish, check
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.config import load_config
from holdfast.kvstore.daemon import DataDirectory
from holdfast.kvstore.findings import KINDS, Code, Forget, Severity
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.machine import Machine
from holdfast.kvstore.seal import CHECKSUM_BYTES
from holdfast.kvstore.slots import Slot
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from daemon_process import DaemonProcess, durable, expected, fetch, put, until
from fakes import EXTENT_BYTES, tiny_spec
from holdfast import cli

TOKENS = 72  # three extents
LOOK = Wish(fix=False, data=False)
FIX = Wish(fix=True, data=False)
READ = Wish(fix=False, data=True)
FIX_READ = Wish(fix=True, data=True)


@pytest.fixture(scope="module")
def origin():
    """Two documents of three extents each, a pin, and a daemon that has stopped."""
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        for name in ("one", "two"):
            put(client, name, TOKENS)
            until(lambda name=name: durable(client, name), "it is durable")
        client.pin("one", "nvme")
        assert daemon.stop() == 0
        yield daemon


class Place:
    """A copy of the directory, and what a test does to it."""

    def __init__(self, origin, path):
        self.directory = path / "data"
        shutil.copytree(origin.data_dir, self.directory)
        self.settings = {
            **origin.settings,
            "daemon.data_dir": str(self.directory),
            "ddr.directory": str(path / "shm"),
        }
        (path / "shm").mkdir()
        self.nvme = self.directory / "nvme"

    @property
    def config(self):
        return load_config(None, {}, self.settings)

    @property
    def arena(self):
        found = arena_directory(self.config, Machine())
        found.mkdir(exist_ok=True)
        return found

    def sql(self, statement, *values):
        with closing(sqlite3.connect(self.directory / "catalog.sqlite")) as database, database:
            return database.execute(statement, values).fetchall()

    def row(self, document="one", position=0):
        """The id, segment and offset of a document's extent."""
        manifest = msgspec.msgpack.decode(
            self.sql("SELECT extents FROM documents WHERE name = ?", document)[0][0], type=list[str]
        )
        query = "SELECT id, segment, segment_offset FROM extents WHERE id = ?"
        return self.sql(query, manifest[position])[0]

    def flip(self, document="one", position=0):
        _, segment, offset = self.row(document, position)
        with (self.nvme / f"segment-{segment}").open("r+b") as file:
            file.seek(offset + 5000)
            byte = file.read(1)
            file.seek(offset + 5000)
            file.write(bytes([byte[0] ^ 1]))

    def check(self, wish=LOOK):
        return check(self.config, ManualClock(), wish, lambda *_: None)

    def codes(self, wish=LOOK):
        return [finding.code.value for finding in self.check(wish).found]


@pytest.fixture
def place(origin, tmp_path):
    return Place(origin, tmp_path)


# Damage: what is done, what is found (notes that follow are listed too), and what is lost by the repair.


def unreadable(place):
    place.sql("UPDATE extents SET checksums = 'text' WHERE id = ?", place.row()[0])


def mismatch_slot(place):
    place.sql("UPDATE extents SET slot_bytes = 4096 WHERE id = ?", place.row()[0])


def mismatch_seal(place):
    place.sql("UPDATE extents SET checksums = x'0011223344556677' WHERE id = ?", place.row()[0])


def mismatch_start(place):
    place.sql("UPDATE extents SET start = 640 WHERE id = ?", place.row()[0])


def misaligned(place):
    place.sql("UPDATE extents SET segment_offset = segment_offset + 512 WHERE id = ?", place.row()[0])


def outside(place):
    place.sql("UPDATE extents SET segment_offset = 1048576 WHERE id = ?", place.row()[0])


def overlap(place):
    _, segment, offset = place.row("one")
    place.sql("UPDATE extents SET segment = ?, segment_offset = ? WHERE id = ?", segment, offset, place.row("two")[0])


def missing_file(place):
    (number,) = {place.row(name, position)[1] for name in ("one", "two") for position in range(3)}
    (place.nvme / f"segment-{number}").unlink()


def short_file(place):
    (path,) = place.nvme.glob("segment-*")
    with path.open("r+b") as file:
        file.truncate(5 * EXTENT_BYTES)


def orphan_row(place):
    place.sql("DELETE FROM pins")
    place.sql("DELETE FROM documents WHERE name = 'two'")


def orphan_file(place):
    (place.nvme / "segment-9").write_bytes(bytes(1000))


def orphan_slab(place):
    (place.arena / "slab-0-1").write_bytes(b"old")
    (place.arena / "slab-0-2").write_bytes(b"new")


def slab_beyond(place):
    (place.arena / "slab-16-1").write_bytes(b"beyond")


def pin(place):
    place.sql("UPDATE pins SET name = 'nobody'")


def bad_pin(place):
    place.sql("UPDATE pins SET floor = 77")


def address(place):
    (place.directory / "rest.json").write_text("{}")


def stale_socket(place):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place.settings["daemon.socket"])


def drop_row(place):
    place.sql("DELETE FROM extents WHERE id = ?", place.row()[0])


def foreign(place):
    (place.nvme / "notes.txt").write_text("mine")
    (place.nvme / "lost+found").mkdir()  # the file system's own


def no_spec(place):
    place.sql("DELETE FROM specs")
    place.sql("DELETE FROM extents")


def short_manifest(place):
    place.sql("UPDATE documents SET token_count = 640 WHERE name = 'one'")


def bad_document(place):
    place.sql("UPDATE documents SET write_policy = 'never' WHERE name = 'two'")


REPAIRED = [
    (unreadable, ["row-unreadable"], 1),
    (mismatch_slot, ["extent-row-mismatch"], 1),
    (mismatch_seal, ["extent-row-mismatch"], 1),
    (mismatch_start, ["extent-row-mismatch"], 1),
    (misaligned, ["extent-row-outside-segment"], 1),
    (outside, ["extent-row-outside-segment"], 1),
    (overlap, ["slots-overlap"], 1),
    (missing_file, ["segment-file-missing"] * 6, 6),
    (short_file, ["segment-file-short"], 1),
    (orphan_row, ["extent-orphan"] * 3, 3),
    (orphan_file, ["segment-file-orphan"], 0),
    (orphan_slab, ["slab-file-orphan"], 0),
    (slab_beyond, ["slab-file-orphan"], 0),
    (pin, ["pin-without-document"], 0),
    (bad_pin, ["row-unreadable"], 0),
    (address, ["stale-address"], 0),
    (stale_socket, ["stale-socket"], 0),
]
UNREPAIRED = [
    (drop_row, ["document-has-hole"]),
    (foreign, ["foreign-file"]),
    (no_spec, ["document-without-spec"] * 2),
    (short_manifest, ["document-row-mismatch"]),
    (bad_document, ["row-unreadable"]),
]


def ids(case):
    return getattr(case, "__name__", "")


@pytest.mark.parametrize(("damage", "codes", "lost"), REPAIRED, ids=ids)
def test_damage_is_found_and_repaired(place, damage, codes, lost):
    place.settings["daemon.socket"] = f"{place.directory.parent.name[:40]}.sock"  # the path of a socket is short
    place.settings["daemon.socket"] = str(Path("/tmp") / f"hf-{place.settings['daemon.socket']}")
    before = len(place.sql("SELECT id FROM extents"))
    documents = place.sql("SELECT tenant, name FROM documents")
    damage(place)
    kept = place.sql("SELECT tenant, name FROM documents")
    assert [code for code in place.codes() if code != "document-has-hole"] == codes
    report = place.check(FIX)
    assert {finding.code for finding in report.fixed} >= {Code(code) for code in codes}
    assert set(place.codes()) <= {"document-has-hole"}
    assert place.check(FIX).fixed == ()
    assert len(place.sql("SELECT id FROM extents")) == before - lost
    assert place.sql("SELECT tenant, name FROM documents") == kept, "a document is never deleted"
    assert kept == documents or damage is orphan_row
    assert not Path(place.settings["daemon.socket"]).exists()


@pytest.mark.parametrize(("damage", "codes"), UNREPAIRED, ids=ids)
def test_what_only_a_person_can_help_with_stays(place, damage, codes):
    damage(place)
    assert [code for code in place.codes() if not code.startswith("segment-file-orphan")][: len(codes)] == codes
    remaining = place.check(FIX).remaining
    assert set(codes) <= {finding.code.value for finding in remaining}
    assert place.sql("SELECT name FROM documents") == [("one",), ("two",)]


def test_every_code_that_disk_can_show_is_planted():
    shown = {code for _, codes, _ in REPAIRED for code in codes} | {code for _, codes in UNREPAIRED for code in codes}
    elsewhere = {  # tests below, and test_check_live
        "sqlite-integrity",
        "segment-mixed",
        "budget-exceeded",
        "extent-corrupt",
        "extent-unreadable",
        "document-without-row",
        "document-row-stale",
        "extent-without-row",
        "extent-row-stale",
        "extent-row-differs",
        "claim-of-nobody",
        "accounts-differ",
    }
    assert shown | elsewhere == {code.value for code in Code}
    assert set(KINDS) == set(Code)


def test_a_healthy_directory_is_clean(place):
    for wish in (LOOK, READ, FIX_READ):
        report = place.check(wish)
        assert report.found == report.fixed == report.remaining == ()
        assert (report.documents, report.extents) == (2, 6)
    assert place.check(READ).read_bytes == 6 * EXTENT_BYTES
    assert place.check(LOOK).read_bytes == 0


def test_a_flipped_byte_is_found_by_reading_only(place):
    place.flip("two", 1)
    assert place.codes() == []
    assert place.codes(READ) == ["extent-corrupt"]
    report = place.check(FIX_READ)
    assert [finding.code.value for finding in report.remaining] == ["document-has-hole"]
    assert "[32, 64) of default/two" in report.fixed[0].subject
    assert place.codes(READ) == ["document-has-hole"]


def test_of_two_that_overlap_the_one_whose_seal_holds_stays(place):
    """The earlier row points to the later one's bytes: the earlier is dropped."""
    first, second = sorted((place.row("one"), place.row("two")))
    place.sql("UPDATE extents SET segment = ?, segment_offset = ? WHERE id = ?", *second[1:], first[0])
    report = place.check(FIX)
    assert [finding.repair.extent for finding in report.fixed if isinstance(finding.repair, Forget)] == [first[0]]
    assert place.sql("SELECT id FROM extents WHERE id = ?", second[0]) == [(second[0],)]


def test_a_damaged_catalog_file_is_reported(place):
    path = place.directory / "catalog.sqlite"
    content = bytearray(path.read_bytes())
    (root,) = place.sql("SELECT rootpage FROM sqlite_schema WHERE name = 'extents'")[0]
    content[(root - 1) * 4096 : (root - 1) * 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)
    assert "sqlite-integrity" in place.codes(FIX)
    assert path.read_bytes() == content


def test_a_smaller_budget_is_a_warning_and_costs_nothing(place):
    place.settings["nvme.segment_bytes"] = "64 KiB"
    report = place.check(FIX)
    assert [finding.code.value for finding in report.found] == ["budget-exceeded"]
    assert report.fixed == ()
    assert len(place.sql("SELECT id FROM extents")) == 6


def test_a_repaired_directory_starts_and_serves(origin, place):
    missing = place.row("one", 1)[0]
    place.sql("UPDATE extents SET segment_offset = 1048576 WHERE id = ?", missing)
    place.flip("one", 2)
    place.check(FIX_READ)
    with DaemonProcess() as daemon:
        shutil.copytree(place.directory, daemon.data_dir)
        client = daemon.start().client()
        assert fetch(client, "two") == expected("two", TOKENS)
        assert client.document("one").missing_tokens == [(32, 72)]
        put(client, "one", TOKENS)
        assert fetch(client, "one") == expected("one", TOKENS)


# The command line --------------------------------------------------------------------------------


def run(place, *arguments):
    settings = [word for key, value in place.settings.items() for word in ("--set", f"{key}={value}")]
    return CliRunner().invoke(cli.app, ["check", *arguments, *settings])


def test_the_command_exits_by_what_remains(place):
    result = run(place)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "2 documents, 6 extents" in result.stdout
    assert "nothing found" in result.stdout
    overlap(place)
    result = run(place)
    assert result.exit_code == 1
    assert "slots-overlap" in result.stdout
    assert "--fix" in result.stdout
    result = run(place, "--fix")
    assert result.exit_code == 0
    assert "fixed: of the corrupt or later one drop the row" in result.stdout
    assert run(place).exit_code == 0


def test_the_command_speaks_json(place):
    place.flip()
    found = json.loads(run(place, "--json", "--data").stdout)
    assert found["clean"] is False
    assert found["daemon"] is None
    assert found["read_bytes"] == 6 * EXTENT_BYTES
    (finding,) = found["findings"]
    assert finding["code"] == "extent-corrupt"
    assert finding["severity"] == "error"
    assert finding["fix"].startswith("drop the row")
    fixed = json.loads(run(place, "--json", "--data", "--fix").stdout)
    assert fixed["clean"] is True
    assert [f["fixed"] for f in fixed["findings"] if f["code"] == "extent-corrupt"] == [True]


def test_where_nothing_is_the_command_says_so(place, tmp_path):
    place.settings["daemon.data_dir"] = str(tmp_path / "nowhere")
    result = run(place)
    assert result.exit_code == 2
    assert "has no catalog.sqlite" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_starting_daemon_is_not_checked_behind_its_back(place):
    directory = DataDirectory(place.directory)
    try:
        result = run(place)
        assert result.exit_code == 5  # owned, and nobody answers yet
    finally:
        directory.close()


# The rules ---------------------------------------------------------------------------------------


SPEC = tiny_spec()
SEAL = bytes(extent_geometry(SPEC).plane_count * CHECKSUM_BYTES)


def stored(name, slot):
    from holdfast.kvstore.extent import Extent

    extent = Extent(
        id=f"{name}:0",
        tenant="t",
        fingerprint=SPEC.fingerprint(),
        group=0,
        start=0,
        valid_tokens=32,
        previous=None,
        block_keys=b"",
        slot_bytes=slot.size_bytes,
    )
    return StoredExtent(extent, SEAL, slot)


def facts(rows, **changes):
    given = {
        "specs": {SPEC.fingerprint(): SPEC},
        "extents": tuple(rows),
        "nvme_directory": "nvme",
        "segment_bytes": 16 * EXTENT_BYTES,
        "segment_count": 4,
        "segments": dict.fromkeys(range(4), 16 * EXTENT_BYTES),
        "slab_count": 4,
        "present": (),
    }
    return Facts(**given | changes)


places = st.tuples(st.integers(-1, 5), st.integers(-1, 17))
row_lists = st.lists(st.tuples(places, st.booleans()), max_size=12)


@given(row_lists)
def test_what_is_left_after_the_repairs_is_clean_and_nothing_sound_is_lost(wanted):
    """However rows lie: dropping what is found leaves no finding, and a sound row alone in its place stays."""
    rows = [
        stored(f"{n:02}", Slot(slab, index * EXTENT_BYTES, EXTENT_BYTES)) for n, ((slab, index), _) in enumerate(wanted)
    ]
    damage = {row.extent.id: "bad" for row, (_, is_bad) in zip(rows, wanted, strict=True) if is_bad}
    before = facts(rows, damage=damage)
    found = audit(before)
    dropped = {finding.repair.extent for finding in found if isinstance(finding.repair, Forget)}
    left = [row for row in rows if row.extent.id not in dropped]
    after = audit(facts(left, damage={e: w for e, w in damage.items() if e not in dropped}))
    assert not [finding for finding in after if finding.repair is not None]
    assert not overlapping(left)
    shared = {row.extent.id for row in overlapping(readable(before))}
    for row in readable(before):
        if row.extent.id not in damage and row.extent.id not in shared:
            assert row.extent.id not in dropped
    for group in {row.slot for row in readable(before)}:
        sound = [row for row in readable(before) if row.slot == group and row.extent.id not in damage]
        assert not sound or any(row in left for row in sound), "of those that share bytes a sound one stays"


def test_a_device_that_refuses_to_read_loses_no_row():
    row = stored("00", Slot(0, 0, EXTENT_BYTES))
    (finding,) = audit(facts([row], failed={row.extent.id: "EIO"}))
    assert (finding.code, finding.repair, finding.severity) == (Code.EXTENT_UNREADABLE, None, Severity.ERROR)


def test_a_large_slot_that_covers_several_is_seen_over_all_of_them():
    big = stored("00", Slot(0, 0, 4 * EXTENT_BYTES))
    small = [stored(f"{n:02}", Slot(0, n * EXTENT_BYTES, EXTENT_BYTES)) for n in range(1, 4)]
    assert {row.extent.id for row in overlapping([big, *small])} == {row.extent.id for row in [big, *small]}
