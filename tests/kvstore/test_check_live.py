"""`holdfast check` beside a running daemon: the catalog is changed behind its back, claims and accounts go wrong."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from holdfast.kvstore.audit import StoredExtent
from holdfast.kvstore.audit_state import Held, Look, accounts, against_rows, books, claims, marks
from holdfast.kvstore.checks import Checks
from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.errors import NotFound
from holdfast.kvstore.findings import Code, EndClaims
from holdfast.kvstore.ledger import Ledger
from holdfast.kvstore.problems import problems
from holdfast.kvstore.repairs import Repairs
from holdfast.kvstore.residency import Tier
from typer.testing import CliRunner

from daemon_process import DaemonProcess, durable, expected, fetch, put, until
from fakes import CLIENT, EXTENT_BYTES, FAR_NS, ingest, tiny_config, tiny_service
from holdfast import cli

TOKENS = 72


@pytest.fixture
def daemon():
    with DaemonProcess() as found:
        client = found.start().client()
        for name in ("one", "two"):
            put(client, name, TOKENS)
            until(lambda name=name: durable(client, name), "it is durable")
        yield found


def sql(daemon, statement, *values):
    with closing(sqlite3.connect(daemon.data_dir / "catalog.sqlite", timeout=20)) as database, database:
        return database.execute(statement, values).fetchall()


def check(daemon, *, fix=False, data=False):
    """The codes that a check finds, and its answer."""
    found = daemon.rest().post("/v1/check", {"fix": fix, "data": data, "deadline_seconds": 20})
    assert found["state"] == "done"
    return [finding["code"] for finding in found["findings"]], found


def drop_extent(daemon):
    sql(daemon, "DELETE FROM extents WHERE start = 32 AND id IN (SELECT id FROM extents WHERE start = 32 LIMIT 1)")


def move_extent(daemon):
    sql(daemon, "UPDATE extents SET segment_offset = 1048576 WHERE id = (SELECT min(id) FROM extents)")


def short_seal(daemon):
    sql(daemon, "UPDATE extents SET checksums = zeroblob(8) WHERE id = (SELECT min(id) FROM extents)")


def add_extent(daemon):
    sql(daemon, "INSERT INTO extents SELECT 'ff:0', " + COLUMNS + " FROM extents LIMIT 1")


COLUMNS = (
    "tenant, fingerprint, layer_group, start, valid_tokens, previous, block_keys, slot_bytes, checksums, segment, "
    "segment_offset"
)


def drop_document(daemon):
    sql(daemon, "DELETE FROM documents WHERE name = 'two'")


def add_document(daemon):
    sql(
        daemon,
        "INSERT INTO documents SELECT tenant, 'ghost', fingerprint, token_count, extents, write_policy, "
        "created_wall_ns, NULL FROM documents LIMIT 1",
    )


def add_pin(daemon):
    sql(daemon, "INSERT INTO pins VALUES ('default', 'nobody', 1, 10, 'me', '', 0, NULL, 'hard', NULL, 'never')")


def orphan_file(daemon):
    (daemon.data_dir / "nvme" / "segment-16").write_bytes(bytes(100))


def orphan_slab(daemon):
    (directory,) = daemon._shared.iterdir()
    (newest,) = directory.glob("slab-0-*")
    serial = int(newest.name.split("-")[2])
    newest.with_name(f"slab-0-{serial - 1}").write_bytes(b"old")


def unreadable(daemon):
    sql(daemon, "UPDATE extents SET slot_bytes = 'many' WHERE id = (SELECT min(id) FROM extents)")


DAMAGE = [
    (drop_extent, {"extent-without-row"}),
    (move_extent, {"extent-row-differs"}),
    (short_seal, {"extent-row-mismatch"}),
    (add_extent, {"extent-row-stale"}),
    (drop_document, {"document-without-row"}),
    (add_document, {"document-row-stale"}),
    (add_pin, {"pin-without-document"}),
    (orphan_file, {"segment-file-orphan"}),
    (orphan_slab, {"slab-file-orphan"}),
    (unreadable, {"row-unreadable", "extent-without-row"}),
]


@pytest.mark.parametrize(("damage", "codes"), DAMAGE, ids=lambda case: getattr(case, "__name__", ""))
def test_what_was_changed_beside_the_daemon_is_found_and_mended(daemon, damage, codes):
    assert check(daemon)[0] == []
    damage(daemon)
    found, _ = check(daemon)
    assert set(found) == codes
    found, answer = check(daemon, fix=True)
    assert set(found) == codes
    assert answer["clean"]
    assert check(daemon)[0] == []
    until(lambda: sql(daemon, "SELECT count(*) FROM extents") == [(6,)], "what was given up is written again from DDR")
    client = daemon.restart_cold().client()
    for name in ("one", "two"):
        assert fetch(client, name) == expected(name, TOKENS)
    assert {document.name for document in client.documents()} == {"one", "two"}
    assert check(daemon)[0] == []


def test_corrupt_bytes_are_found_by_reading_and_quarantined(daemon):
    client = daemon.restart_cold().client()
    segment, offset = sql(daemon, "SELECT segment, segment_offset FROM extents WHERE start = 64")[0]
    with (daemon.data_dir / "nvme" / f"segment-{segment}").open("r+b") as file:
        file.seek(offset + 4096)
        file.write(b"\0" * 8)
    assert check(daemon)[0] == []
    found, answer = check(daemon, data=True)
    assert found == ["extent-corrupt"]
    assert answer["read_bytes"] == answer["total_bytes"] == 6 * EXTENT_BYTES
    assert all(client.document(name).complete for name in ("one", "two")), "looking changes nothing"
    found, answer = check(daemon, data=True, fix=True)
    assert found == ["extent-corrupt", "document-has-hole"]
    assert answer["clean"]
    shown = [client.document(name) for name in ("one", "two")]
    assert sorted(document.missing_tokens for document in shown) == [[], [(64, 72)]]
    whole = next(document.name for document in shown if document.complete)
    assert fetch(client, whole) == expected(whole, TOKENS)
    assert check(daemon, data=True)[0] == ["document-has-hole"]
    assert daemon.used("nvme") == 5 * EXTENT_BYTES


def test_a_file_that_was_removed_costs_its_extents_and_no_more(daemon):
    client = daemon.restart_cold().client()
    for path in (daemon.data_dir / "nvme").glob("segment-*"):
        path.unlink()
    found, _ = check(daemon)
    assert set(found) == {"segment-file-missing"}
    assert check(daemon, fix=True)[1]["clean"]
    assert not client.document("one").complete
    put(client, "one", TOKENS)
    assert fetch(client, "one") == expected("one", TOKENS)


def test_a_daemon_at_work_is_clean(daemon):
    """Checks run while documents come, leave and are read: nothing that is merely under way is reported."""
    client = daemon.client()
    for turn in range(8):
        name = f"busy-{turn % 3}"
        daemon.rest().post("/v1/check", {"data": turn % 2 == 0, "deadline_seconds": 0})
        put(client, name, TOKENS)
        client.free(name)
        assert fetch(client, name) == expected(name, TOKENS)
        if turn % 3 == 2:
            client.delete(name)
        answer = until(lambda: (a := daemon.rest().get("/v1/check"))["state"] == "done" and a, "the check ends")
        assert answer["clean"], answer["findings"]


def test_the_last_check_is_remembered_and_one_runs_at_a_time(daemon):
    with pytest.raises(NotFound):
        daemon.rest().get("/v1/check")
    check(daemon)
    assert daemon.rest().get("/v1/check")["state"] == "done"


def test_the_command_asks_the_daemon_that_owns_the_directory(daemon):
    drop_document(daemon)
    settings = [word for key, value in daemon.settings.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(cli.app, ["check", "--json", *settings])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["daemon"].startswith("http://127.0.0.1:")
    assert [finding["code"] for finding in found["findings"]] == ["document-without-row"]
    assert CliRunner().invoke(cli.app, ["check", "--fix", "--data", *settings]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["check", "--url", found["daemon"]]).exit_code == 0


# Rules and repairs without a daemon ----------------------------------------------------------------


def looked(service):
    look = Look(extents={key: Held.of(record) for key, record in service.state.extents.items()}, is_steady=True)
    look.documents = {key: (owner.document, owner.durable) for key, owner in service.state.documents.items()}
    look.add(service.state.all_placements())
    look.books = books(service.state)
    return look


def test_accounts_that_agree_are_silent_and_others_are_named():
    service, effects, _ = tiny_service()
    ingest(service, effects, "a")
    assert list(accounts(looked(service))) == []
    service.state.ledger.came("ddr", 7)
    (finding,) = accounts(looked(service))
    assert (finding.code, finding.subject, finding.repair) == (Code.ACCOUNTS_DIFFER, "ddr", None)
    service.state.ledger.left("ddr", 7)
    one, two, *_ = [record.nvme for record in service.state.extents.values()]
    two.slot = one.slot
    assert [finding.code for finding in accounts(looked(service))] == [Code.ACCOUNTS_DIFFER]
    look = looked(service)
    look.is_steady = False
    assert list(accounts(look)) == [], "copies came and went: nothing can be said"


def test_marks_change_with_every_copy():
    service, effects, _ = tiny_service()
    before = marks(service.state)
    ingest(service, effects, "a")
    assert marks(service.state) != before
    assert isinstance(service.state.ledger, Ledger)


def test_claims_of_a_client_that_is_gone_are_found_and_ended():
    service, effects, _ = tiny_service()
    document = ingest(service, effects, "a")
    service.attach(CLIENT, document, None, None, None, FAR_NS, lambda _: None)
    effects.complete_all(service)
    assert list(claims(service.state, {}, {CLIENT})) == []
    (finding,) = claims(service.state, {}, set())
    assert (finding.code, finding.repair) == (Code.CLAIM_OF_NOBODY, EndClaims(CLIENT))
    told = []
    Repairs(service).carry_out(finding.repair, told.append)
    assert told == [None]
    assert list(claims(service.state, {}, set())) == []
    service.state.check()


def test_what_moved_between_the_looks_is_no_finding():
    service, effects, _ = tiny_service()
    document = ingest(service, effects, "a", token_count=32)
    before = looked(service)
    assert {finding.code for finding in against_rows(before, {}, {}, (), looked(service))} == {
        Code.EXTENT_WITHOUT_ROW,
        Code.DOCUMENT_WITHOUT_ROW,
    }
    service.evict(document, Tier.NVME, 0, FAR_NS, lambda _: None)
    service.delete(document)
    effects.complete_all(service)
    assert list(against_rows(before, {}, {}, (), looked(service))) == []
    rows = {held.extent.id: StoredExtent(held.extent, b"", held.slot) for held in before.settled}
    assert list(against_rows(before, rows, {document: before.documents[document][0]}, (), looked(service))) == []
    found = {finding.code for finding in against_rows(looked(service), rows, {}, (), looked(service))}
    assert found == {Code.EXTENT_ROW_STALE}
    assert document == DocumentId("default", "a")


def test_a_deletion_on_its_way_to_the_catalog_is_no_finding():
    service, effects, _ = tiny_service()
    document = ingest(service, effects, "a", token_count=32)
    rows = {document: looked(service).documents[document][0]}
    service.delete(document)
    look = looked(service)
    look.telling = service.upkeep.telling
    assert list(against_rows(look, {}, rows, [document], look)) == []
    effects.complete_all(service)
    look.telling = service.upkeep.telling
    assert {finding.code for finding in against_rows(look, {}, rows, [document], look)} == {
        Code.DOCUMENT_ROW_STALE,
        Code.PIN_WITHOUT_DOCUMENT,
    }


def test_a_scrub_holds_its_copy_and_lets_go():
    service, effects, _ = tiny_service()
    document = ingest(service, effects, "a", token_count=32)
    (record,) = service.state.extents.values()
    told = []
    Repairs(service).scrub(record.extent.id, told.append)
    assert record.nvme.holds == 1
    (order,) = effects.orders
    effects.complete(service, order)
    assert told == [None]
    assert record.nvme.holds == 0
    Repairs(service).scrub("gone:0", told.append)
    assert told == [None, None]
    service.delete(document)
    effects.complete_all(service)
    service.state.check()


async def test_one_check_runs_at_a_time_and_ends_with_the_daemon():
    service, effects, _ = tiny_service()
    ingest(service, effects, "a", token_count=32)
    checks = Checks(service, tiny_config(), set, lambda: None)
    app = web.Application(middlewares=[problems])
    app.add_routes(checks.routes())
    async with TestClient(TestServer(app)) as client:
        wanted = {"data": True, "deadline_seconds": 0}
        async with client.post("/v1/check", json=wanted) as response:
            assert response.status == 202
        async with client.post("/v1/check", json=wanted) as response:
            assert response.status == 409
        async with client.get("/v1/check") as response:
            assert (response.status, (await response.json())["state"]) == (202, "running")
        await checks.close()
        async with client.get("/v1/check") as response:
            assert response.status == 503
