"""SIGKILL at any instant: what was durable reads back bit-exact, what was not is absent, and nothing is leaked.

Each fault kills the real daemon, from within, at its 1st, 2nd, ... moment, until an operation survives. Then a daemon
starts on what is left: on disk alone (cold, as after a reboot), or in memory too (warm), where what was acknowledged
but not durable may be found again, bit-exact.
"""

import signal
import sqlite3
from contextlib import suppress

import pytest
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import CorruptExtent, DaemonUnavailable, DocumentIncomplete

from daemon_faults import CREATION_FAULTS, FAULTS, NOTES, Kill
from daemon_process import DaemonProcess, durable, expected, fetch, put, tokens_of, until, write
from fakes import EXTENT_BYTES, tiny_spec

TOKENS = 72  # three extents, the last part-filled
EXTENTS = 3
MOMENTS_MAX = 40


class Story:
    """What a test does to a daemon: `before` sets the stage, `act` is the operation, during which it may die."""

    lost = ()  # documents that may be gone afterwards, though they were durable

    def before(self, client):
        pass

    def act(self, client):
        raise NotImplementedError


class Ingest(Story):
    """A document that is written through, beside one that is durable already."""

    def before(self, client):
        put(client, "old", TOKENS)
        until(lambda: durable(client, "old"), "the old document is durable")

    def act(self, client):
        put(client, "new", TOKENS)
        until(lambda: durable(client, "new"), "the new document is durable")


class Evict(Story):
    """A document that is written out because it has to leave DDR, and read back."""

    def before(self, client):
        put(client, "new", TOKENS, WritePolicy.BACK)

    def act(self, client):
        client.free("new")
        until(lambda: durable(client, "new"), "the evicted document is durable")
        assert fetch(client, "new") == expected("new", TOKENS)


class Delete(Story):
    """A durable document is deleted, and its slots are used by the next one at once."""

    lost = ("old",)

    def before(self, client):
        put(client, "old", TOKENS)
        until(lambda: durable(client, "old"), "the old document is durable")

    def act(self, client):
        client.delete("old")
        put(client, "new", TOKENS)
        until(lambda: durable(client, "new"), "the new document is durable")


class Drop(Story):
    """A durable document is dropped out of NVMe too, its name stays; the next one takes its slots."""

    lost = ("old",)

    def before(self, client):
        put(client, "old", TOKENS)
        until(lambda: durable(client, "old"), "the old document is durable")

    def act(self, client):
        client.free("old", "none")
        put(client, "new", TOKENS)
        until(lambda: durable(client, "new"), "the new document is durable")


class Creation(Ingest):
    """As above, but the segment's file is made during it."""

    def before(self, client):
        pass


def run(daemon, story):
    """Set the stage and act. Returns the durable documents that a kill must not take away, and whether one came."""
    client = daemon.client()
    story.before(client)
    kept = {document.name for document in client.documents() if document.durable} - set(story.lost)
    (daemon.directory / "armed").touch()
    with suppress(DaemonUnavailable):
        story.act(client)
        return kept | {"new"}, False
    return kept, True


def check(daemon, kept, memory="cold"):
    """A fresh daemon on the same directory: every document is whole, or known to be incomplete, or absent."""
    (daemon.directory / "armed").unlink(missing_ok=True)
    if memory == "cold":
        daemon.cool()
    client = daemon.start().client()
    found = {document.name: document for document in client.documents()}
    assert kept <= set(found), "a durable document is gone"
    for name, document in found.items():
        assert document.durable == document.complete or memory == "warm"
        if document.complete:
            assert fetch(client, name) == expected(name, TOKENS), f"{name} differs"
        else:
            assert name not in kept
            with pytest.raises(DocumentIncomplete):
                client.attach(name)
    until(lambda: daemon.used("nvme") == rows(daemon) * EXTENT_BYTES, "the catalog and the tier agree")
    if memory == "cold" and all(document.complete for document in found.values()):
        assert daemon.used("nvme") == len(found) * EXTENTS * EXTENT_BYTES, "an extent without a document is kept"
    again = put(client, "again", TOKENS)
    until(lambda: durable(client, "again"), "the daemon works")
    for name in ("old", "new"):
        put(client, name, TOKENS)
    client.free("again")
    assert fetch(client, "again") == again
    for name in ("old", "new"):
        assert fetch(client, name) == expected(name, TOKENS)


def rows(daemon):
    """Extents in the catalog."""
    with sqlite3.connect(f"file:{daemon.data_dir}/catalog.sqlite?mode=ro", uri=True) as database:
        count = database.execute("SELECT count(*) FROM extents").fetchone()[0]
    database.close()
    return count


MOMENTS = [
    *((story, kind, "cold") for story in (Ingest(), Evict(), Delete(), Drop()) for kind in FAULTS),
    *((Creation(), kind, "cold") for kind in CREATION_FAULTS),
    *((story, kind, "warm") for story in (Ingest(), Delete()) for kind in NOTES),
    *((Delete(), kind, "warm") for kind in ("pwrite, half", "commit, before", "commit, after")),
]


@pytest.mark.parametrize(
    ("story", "kind", "memory"), MOMENTS, ids=lambda case: case if isinstance(case, str) else type(case).__name__
)
def test_a_kill_at_any_moment_loses_nothing_durable(story, kind, memory):
    for count in range(1, MOMENTS_MAX):
        with DaemonProcess() as daemon:
            daemon.start(Kill(kind, count, daemon.directory / "armed"))
            kept, killed = run(daemon, story)
            if killed:
                assert daemon.wait() == -signal.SIGKILL
            else:
                daemon.kill()
            check(daemon, kept, memory)
            if not killed:
                assert count > 1, "the fault never struck"
                return
    pytest.fail(f"more than {MOMENTS_MAX} moments")


def test_a_kill_between_ingest_and_commit_leaves_nothing():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        opened = client.begin_ingest("new", tiny_spec().fingerprint(), tokens_of("new", TOKENS))
        write(client, "new", opened.parts)
        daemon.kill()
        check(daemon, set())


@pytest.mark.parametrize("policy", [WritePolicy.BACK, WritePolicy.MEMORY])
def test_what_only_memory_holds_ends_with_the_process(policy):
    with DaemonProcess() as daemon:
        put(daemon.start().client(), "new", TOKENS, policy)
        daemon.kill()
        check(daemon, set())
        assert daemon.used("nvme") > 0


def test_memory_is_never_doubled_and_a_stop_gives_it_back():
    with DaemonProcess() as daemon:
        put(daemon.start().client(), "new", TOKENS)
        before = {path.name for path in daemon._shared.rglob("slab-*")}
        daemon.restart()
        after = {path.name for path in daemon._shared.rglob("slab-*")}
        assert len(after) == len(before) == 16, "one file a slab"
        assert daemon.stop() == 0
        assert list(daemon._shared.iterdir()) == []


def test_a_flipped_byte_is_found_shown_and_repaired():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        content = put(client, "report", TOKENS)
        put(client, "other", TOKENS)
        until(lambda: durable(client, "report") and durable(client, "other"), "both are durable")
        daemon.kill()
        daemon.cool()  # else memory has it still, and nobody reads the disk
        flip(daemon, "report", 32)
        client = daemon.start().client()
        with pytest.raises(CorruptExtent):
            fetch(client, "report")
        assert daemon.leases() == []
        shown = client.document("report")
        assert not shown.complete
        assert shown.missing_tokens == [(32, 64)]
        with pytest.raises(DocumentIncomplete, match=r"\[32, 64\)"):
            client.attach("report")
        assert fetch(client, "other") == expected("other", TOKENS)
        opened = client.begin_ingest("report", tiny_spec().fingerprint(), tokens_of("report", TOKENS))
        assert [part.start for part in opened.parts] == [32]
        assert opened.cached_tokens == 32
        write(client, "report", opened.parts)
        client.commit_ingest(opened.ingest)
        assert fetch(client, "report") == content
        until(lambda: rows(daemon) == 2 * EXTENTS, "the repair is durable")
        daemon.kill()
        daemon.cool()
        client = daemon.start().client()
        assert fetch(client, "report") == content
        assert fetch(client, "other") == expected("other", TOKENS)


def flip(daemon, name, start):
    """Change one byte of a document's extent on NVMe."""
    with sqlite3.connect(daemon.data_dir / "catalog.sqlite") as database:
        manifest = database.execute("SELECT extents FROM documents WHERE name = ?", (name,)).fetchone()[0]
        query = "SELECT id, segment, segment_offset FROM extents WHERE start = ?"
        found = [row for row in database.execute(query, (start,)) if row[0].encode() in manifest]
    database.close()
    ((_, segment, offset),) = found
    with (daemon.data_dir / "nvme" / f"segment-{segment}").open("r+b") as file:
        file.seek(offset + 5000)
        byte = file.read(1)
        file.seek(offset + 5000)
        file.write(bytes([byte[0] ^ 1]))
