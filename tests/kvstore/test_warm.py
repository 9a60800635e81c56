"""Warm restart with real processes: what lay sealed in memory is there again, and nobody sees what is not his."""

import os
import signal
import sqlite3
import threading
from contextlib import closing, suppress

import pytest
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    CorruptExtent,
    DeadlineExceeded,
    DocumentIncomplete,
    DocumentNotFound,
    HoldfastError,
    NoCapacity,
)

from daemon_clients import client_process, holds_bytes, writes
from daemon_process import DaemonProcess, durable, expected, fetch, put, tokens_of, until, write
from fakes import tiny_spec

TOKENS = 72  # three extents, the last part-filled
EXTENTS = 3
SLAB_BYTES = 64 << 10
CAPACITY_BYTES = 1 << 20
INDEX_BYTES = 1 << 20  # far more than the index of a few extents takes


@pytest.fixture
def daemon():
    with DaemonProcess() as process:
        yield process


def index(daemon, query, *values):
    """Ask, or change, the warm index."""
    with closing(sqlite3.connect(daemon.arena / "warm.sqlite", isolation_level=None)) as database:
        return database.execute(query, values).fetchall()


def noted(daemon, *names):
    """Wait until the index has these documents, and so their extents."""
    until(lambda: set(names) <= {row[0] for row in index(daemon, "SELECT name FROM documents")}, f"{names} are noted")


def verified(daemon, extents):
    until(lambda: daemon.metric("holdfast_adopted_verified_total") >= extents, "everything is verified")


def flip(daemon, name, start):
    """Change one byte of a document's extent in its slab file."""
    manifest = index(daemon, "SELECT extents FROM documents WHERE name = ?", name)[0][0]
    rows = index(daemon, "SELECT id, segment, segment_offset FROM extents WHERE start = ?", start)
    ((_, serial, offset),) = [row for row in rows if row[0].encode() in manifest]
    (path,) = daemon.arena.glob(f"slab-*-{serial}")
    with path.open("r+b") as file:
        file.seek(offset + 5000)
        byte = file.read(1)
        file.seek(offset + 5000)
        file.write(bytes([byte[0] ^ 1]))


def in_bounds(daemon):
    """Memory in shared memory never exceeds the capacity and the index."""
    return daemon.shared_bytes() <= CAPACITY_BYTES + INDEX_BYTES


# What is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_a_killed_daemons_documents_are_in_memory_again(daemon, policy):
    client = daemon.start().client()
    content = put(client, "report", TOKENS, policy)
    if policy is WritePolicy.THROUGH:
        until(lambda: durable(client, "report"), "it is durable")
    noted(daemon, "report")
    client = daemon.restart().client()
    assert fetch(client, "report") == content
    (swap,) = daemon.swaps()
    assert swap["source_tier"] == "ddr"
    assert swap["moved_bytes"] == 0
    assert client.document("report").write_policy.startswith(policy.value)
    assert in_bounds(daemon)


def test_it_is_found_again_and_again(daemon):
    content = put(daemon.start().client(), "report", TOKENS, WritePolicy.MEMORY)
    noted(daemon, "report")
    for _ in range(5):
        assert fetch(daemon.restart().client(), "report") == content
        verified(daemon, EXTENTS)


def test_starts_that_do_not_last_are_not_repeated_for_ever(daemon):
    """Whatever in the index ends every start: the fourth goes without."""
    put(daemon.start().client(), "report", TOKENS, WritePolicy.MEMORY)
    noted(daemon, "report")
    daemon.kill()
    index(daemon, "UPDATE meta SET value = '3' WHERE name = 'starts'")
    with pytest.raises(DocumentNotFound):
        daemon.start().client().attach("report")
    assert index(daemon, "SELECT value FROM meta WHERE name = 'starts'") == [("0",)]


def test_what_was_on_its_way_to_nvme_gets_there(daemon):
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    noted(daemon, "report")
    daemon.kill()
    with closing(sqlite3.connect(daemon.data_dir / "catalog.sqlite", isolation_level=None)) as database:
        database.execute("DELETE FROM documents")  # as if it had not got that far
        database.execute("DELETE FROM extents")
    client = daemon.start().client()
    until(lambda: durable(client, "report"), "it is written through")
    daemon.kill()
    daemon.cool()
    assert fetch(daemon.start().client(), "report") == content


def test_a_document_grows_on_what_was_found(daemon):
    """The front of another document is cached in memory that an earlier daemon filled."""
    tokens = tokens_of("report", 96)
    put(daemon.start().client(), "report", 64, WritePolicy.MEMORY, tokens=tokens[:64])
    noted(daemon, "report")
    client = daemon.restart().client()
    opened = client.begin_ingest("longer", tiny_spec().fingerprint(), tokens)
    assert opened.cached_tokens == 64
    write(client, "report", opened.parts)
    client.commit_ingest(opened.ingest)
    assert fetch(client, "longer") == expected("report", 96)


def test_an_ingest_that_was_open_has_left_nothing(daemon):
    client = daemon.start().client()
    opened = client.begin_ingest("report", tiny_spec().fingerprint(), tokens_of("report", TOKENS))
    write(client, "report", opened.parts)
    client = daemon.restart().client()
    with pytest.raises(DocumentNotFound):
        client.attach("report")
    assert daemon.used("ddr") == 0


def test_what_was_deleted_stays_so(daemon):
    client = daemon.start().client()
    put(client, "report", TOKENS, WritePolicy.MEMORY)
    noted(daemon, "report")
    client.delete("report")
    until(lambda: not index(daemon, "SELECT name FROM documents"), "the index has forgotten it")
    client = daemon.restart().client()
    with pytest.raises(DocumentNotFound):
        client.attach("report")
    until(lambda: daemon.used("ddr") == 0, "its memory is free")


# What is not -----------------------------------------------------------------------------------


def test_a_flipped_byte_is_read_again_from_nvme(daemon):
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    until(lambda: durable(client, "report"), "it is durable")
    noted(daemon, "report")
    daemon.kill()
    flip(daemon, "report", 32)
    client = daemon.start().client()
    assert fetch(client, "report") == content
    assert fetch(client, "report") == content
    verified(daemon, EXTENTS - 1)
    assert daemon.metric("holdfast_quarantined_total") == 1


def test_a_flipped_byte_of_what_only_memory_had_is_lost_and_named(daemon):
    content = put(daemon.start().client(), "report", TOKENS, WritePolicy.MEMORY)
    noted(daemon, "report")
    daemon.kill()
    flip(daemon, "report", 32)
    client = daemon.start().client()
    with pytest.raises((CorruptExtent, DocumentIncomplete), match=r"\[32, 64\)"):
        fetch(client, "report")
    until(lambda: daemon.metric("holdfast_quarantined_total") == 1, "it is counted")
    assert client.document("report").missing_tokens == [(32, 64)]
    opened = client.begin_ingest("report", tiny_spec().fingerprint(), tokens_of("report", TOKENS))
    assert [part.start for part in opened.parts] == [32], "what lies behind the hole is kept"
    write(client, "report", opened.parts)
    client.commit_ingest(opened.ingest)
    assert fetch(client, "report") == content


def test_after_a_reboot_nothing_is_found(daemon):
    client = daemon.start().client()
    put(client, "memory", TOKENS, WritePolicy.MEMORY)
    put(client, "disk", TOKENS)
    until(lambda: durable(client, "disk"), "it is durable")
    noted(daemon, "memory", "disk")
    daemon.kill()
    index(daemon, "UPDATE meta SET value = 'another boot' WHERE name = 'belongs_to'")
    before = {path.name for path in daemon.arena.glob("slab-*")}
    client = daemon.start().client()
    assert daemon.metric("holdfast_adopted_total") == 0
    assert not before & {path.name for path in daemon.arena.glob("slab-*")}
    with pytest.raises(DocumentNotFound):
        client.attach("memory")
    assert fetch(client, "disk") == expected("disk", TOKENS)
    assert daemon.swaps()[0]["source_tier"] == "nvme"
    assert in_bounds(daemon)


@pytest.mark.parametrize("damage", ["garbage", "empty", "directory", "rows"])
def test_an_index_that_cannot_be_read_costs_warmth_and_no_more(daemon, damage):
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    until(lambda: durable(client, "report"), "it is durable")
    noted(daemon, "report")
    daemon.kill()
    path = daemon.arena / "warm.sqlite"
    if damage == "rows":
        index(daemon, "UPDATE extents SET block_keys = 'x', checksums = x'00' WHERE start = 0")
    else:
        for name in ("warm.sqlite", "warm.sqlite-wal", "warm.sqlite-shm"):
            path.with_name(name).unlink(missing_ok=True)
        if damage == "directory":
            path.mkdir()
        else:
            path.write_bytes(b"garbage" * 1000 if damage == "garbage" else b"")
    client = daemon.start().client()
    assert fetch(client, "report") == content
    assert in_bounds(daemon)
    put(client, "another", TOKENS)


@pytest.mark.parametrize(
    "change", [{"ddr.slab_bytes": "128 KiB"}, {"ddr.capacity_bytes": "1 MiB", "ddr.slab_bytes": "256 KiB"}]
)
def test_slabs_of_another_size_are_not_taken_over(daemon, change):
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    until(lambda: durable(client, "report"), "it is durable")
    noted(daemon, "report")
    daemon.kill()
    daemon.settings |= change
    assert fetch(daemon.start().client(), "report") == content
    assert daemon.metric("holdfast_adopted_total") == 0
    assert in_bounds(daemon)


def test_a_smaller_capacity_is_kept(daemon):
    daemon.settings["ddr.capacity_bytes"] = "2 MiB"
    client = daemon.start().client()
    names = [f"d{number}" for number in range(10)]
    for name in names:
        put(client, name, 320)  # ten extents each
    for name in names:
        until(lambda name=name: durable(client, name), f"{name} is durable")
    noted(daemon, *names)
    daemon.kill()
    daemon.settings["ddr.capacity_bytes"] = "1 MiB"
    client = daemon.start().client()
    assert in_bounds(daemon)
    for name in names:
        assert fetch(client, name) == expected(name, 320)
    assert in_bounds(daemon)


def test_a_tenants_bytes_are_never_anothers(daemon):
    """Slabs that were kept go to another tenant only after their memory is gone."""
    client = daemon.start().client("secretive")
    put(client, "report", TOKENS, WritePolicy.MEMORY)
    noted(daemon, "report")
    client.close()
    daemon.kill()
    flip(daemon, "report", 0)
    flip(daemon, "report", 32)
    flip(daemon, "report", 64)
    daemon.start()
    until(lambda: daemon.metric("holdfast_quarantined_total") == 3, "all of it is lost")
    other = daemon.client("curious")
    opened = other.begin_ingest("mine", tiny_spec().fingerprint(), tokens_of("mine", 2048), deadline_seconds=10.0)
    for part in opened.parts:
        view = other.view(part)
        assert bytes(view) == bytes(part.size_bytes)
        view.release()


# Who may still look ----------------------------------------------------------------------------


def test_a_stopped_reader_reads_its_own_bytes_after_a_restart(daemon):
    """It is stopped while it holds a lease; the daemon is killed, and another client uses all the memory there is."""
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    until(lambda: durable(client, "report"), "it is durable")
    noted(daemon, "report")
    with client_process(holds_bytes, daemon.socket, "report") as reader:
        assert reader.hear() == "holding"
        os.kill(reader.process.pid, signal.SIGSTOP)
        client = daemon.restart().client()
        assert daemon.metric("holdfast_ddr_fenced_bytes") > 0
        client.free("report")
        churn(client)
        assert in_bounds(daemon)
        os.kill(reader.process.pid, signal.SIGCONT)
        reader.say("read")
        assert reader.hear() == content
        reader.kill()
    until(lambda: daemon.metric("holdfast_ddr_fenced_bytes") == 0, "its end lifts the fences")
    assert fetch(client, "report") == content


def test_a_stopped_reader_past_its_deadline_reads_its_own_bytes():
    with DaemonProcess(limits__lease_seconds="0.1") as daemon:
        client = daemon.start().client()
        content = put(client, "report", TOKENS)
        until(lambda: durable(client, "report"), "it is durable")
        with client_process(holds_bytes, daemon.socket, "report") as reader:
            assert reader.hear() == "holding"
            os.kill(reader.process.pid, signal.SIGSTOP)
            until(lambda: all(lease["overdue"] for lease in daemon.leases()), "its lease is overdue")
            churn(client)
            os.kill(reader.process.pid, signal.SIGCONT)
            reader.say("read")
            assert reader.hear() == content


def churn(client):
    """Fill all of the memory that there is to have, several times."""
    for number in range(12):
        with suppress(NoCapacity, DeadlineExceeded):
            put(client, f"churn{number}", 320, WritePolicy.MEMORY)


def test_a_writer_that_goes_on_writing_harms_nobody(daemon):
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    noted(daemon, "report")
    with client_process(writes, daemon.socket, "open") as writer:
        assert writer.hear() == "written"
        client = daemon.restart().client()
        heard = threading.Thread(target=lambda: [writer.hear() for _ in range(20)])
        heard.start()
        documents = {}
        for number in range(6):
            with suppress(HoldfastError):
                documents[f"d{number}"] = put(client, f"d{number}", 160, WritePolicy.MEMORY)
        heard.join()
        assert documents
        for name, expected_content in documents.items():
            with suppress(DocumentIncomplete):
                assert fetch(client, name) == expected_content
        assert fetch(client, "report") == content


def test_a_process_that_says_that_it_holds_nothing_lifts_its_fences(daemon):
    client = daemon.start().client()
    content = put(client, "report", TOKENS)
    noted(daemon, "report")
    daemon.kill()
    daemon._clients.remove(client)  # as if it had not noticed yet
    daemon.start()
    assert daemon.metric("holdfast_ddr_fenced_bytes") > 0
    other = daemon.client(resume=[client.number + 1])
    assert daemon.metric("holdfast_ddr_fenced_bytes") > 0
    client.close()  # the daemon it speaks to is gone; the next connection of this process says so
    again = daemon.client()
    assert daemon.metric("holdfast_ddr_fenced_bytes") == 0
    assert fetch(again, "report") == fetch(other, "report") == content
    assert index(daemon, "SELECT * FROM fences WHERE client = ?", client.number) == [] or until(
        lambda: not index(daemon, "SELECT * FROM fences WHERE client = ?", client.number), "its fences are dropped"
    )


def test_fences_are_written_before_a_descriptor_is_handed_out(daemon):
    client = daemon.start().client()
    opened = client.begin_ingest("report", tiny_spec().fingerprint(), tokens_of("report", TOKENS))
    assert index(daemon, "SELECT * FROM fences") == []
    client.view(opened.parts[0]).release()
    rows = index(daemon, "SELECT client, pid, serial FROM fences")
    assert (client.number, os.getpid(), opened.parts[0].serial) in rows
    client.close()
    until(lambda: not index(daemon, "SELECT * FROM fences"), "a goodbye drops them")
