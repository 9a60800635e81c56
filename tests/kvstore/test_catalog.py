"""The catalog: what it is told comes back, all or nothing, whatever happens in between."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from holdfast.kvstore.catalog import SCHEMA_VERSION, Catalog, Contents
from holdfast.kvstore.claims import Pin
from holdfast.kvstore.document import Document, DocumentId, WritePolicy
from holdfast.kvstore.errors import StorageFailed
from holdfast.kvstore.extent import Extent
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.ledger import Wear
from holdfast.kvstore.orders import (
    DropDocument,
    DropExtent,
    DropPin,
    PutDocument,
    PutExtent,
    PutPin,
    PutSpec,
)
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.slots import Slot
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SPEC = KVSpec(
    groups=(
        LayerGroup(layers=(0, 2), kv_heads=2, key_dim=8, value_dim=8),
        LayerGroup(kind=GroupKind.SLIDING, layers=(1,), kv_heads=1, key_dim=8, value_dim=4, window=128),
        LayerGroup(kind=GroupKind.MLA, layers=(3,), kv_heads=1, key_dim=8, value_dim=0),
    ),
    dtype="bfloat16",
    model="weights@1",
    vocabulary_size=1000,
    rope="theta=10000",
    adapter="lora",
    quantisation="none",
    extent_blocks=4,
)
EMPTY = Contents(
    specs=(),
    extents=(),
    documents=(),
    pins=(),
    tenants={},
    prefills=(),
    calibration=None,
    rings=(),
    orphans=(),
    wear=Wear(),
)


def extent(index, tenant="acme"):
    return Extent(
        id=f"{index:032x}:0",
        tenant=tenant,
        fingerprint=SPEC.fingerprint(),
        group=0,
        start=index * SPEC.extent_tokens,
        valid_tokens=SPEC.extent_tokens - 1,
        previous=f"{index - 1:032x}:0" if index else None,
        block_keys=b"".join(bytes([index, block] * 8) for block in range(4)),
        slot_bytes=extent_geometry(SPEC).size_bytes,
    )


def put_extent(index, tenant="acme"):
    found = extent(index, tenant)
    checksums = bytes(8) + b"\xff" * 8 + bytes([index]) * 8
    return PutExtent(found, checksums, Slot(index // 3, index % 3 * found.slot_bytes, found.slot_bytes))


def document(name, *extents, tenant="acme", policy=WritePolicy.THROUGH):
    return Document(
        id=DocumentId(tenant, name),
        fingerprint=SPEC.fingerprint(),
        token_count=1 + 10 * len(extents),
        extents=tuple(extent(index, tenant).id for index in extents),
        write_policy=policy,
        created_wall_ns=1_800_000_000_000_000_000,
    )


def pin(name, **changes):
    found = Pin(
        document=DocumentId("acme", name),
        floor=Tier.DDR,
        size_bytes=1 << 40,
        owner="ops",
        reason="demo",
        created_wall_ns=5,
        expires_wall_ns=None,
    )
    return replace(found, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "catalog.sqlite3"


@pytest.fixture
def catalog(path):
    catalog = Catalog(path)
    yield catalog
    catalog.close()


def reopened(catalog):
    catalog.close()
    other = Catalog(catalog.path)
    contents = other.load()
    assert other.check() == []
    other.close()
    return contents


def test_a_new_catalog_is_empty_sound_private_and_synchronous(catalog, path):
    assert catalog.load() == EMPTY
    assert catalog.check() == []
    catalog.commit([PutSpec(SPEC)])
    assert {entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()} == {0o600}
    assert catalog._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert catalog._database.execute("PRAGMA synchronous").fetchone() == (2,)


def test_everything_comes_back(catalog):
    puts = [put_extent(0), put_extent(1), put_extent(2)]
    documents = [document("a", 0, 1, 2, 9), document("é 中", 0, policy=WritePolicy.MEMORY)]
    pins = [pin("a"), pin("b", floor=Tier.HBM, expires_wall_ns=2**62)]
    catalog.commit(
        [PutSpec(SPEC), *puts, *map(PutDocument, documents), *map(PutPin, pins), PutSpec(replace(SPEC, model="two"))]
    )
    secret = catalog.tenant_secret("acme")
    contents = reopened(catalog)
    assert {spec.model: spec for spec in contents.specs} == {"weights@1": SPEC, "two": replace(SPEC, model="two")}
    assert contents.extents == tuple((put.extent, put.slot) for put in puts)
    assert contents.documents == tuple(documents)
    assert contents.pins == tuple(pins)
    assert contents.tenants == {"acme": secret}
    assert contents.orphans == ()


def test_seals_are_read_one_by_one(catalog):
    put = put_extent(0)
    catalog.commit([put, PutExtent(extent(1), b"123", put.slot)])
    assert catalog.seal(put.extent.id) == put.checksums
    for name in (extent(1).id, "none"):  # no multiple of eight bytes; no row
        with pytest.raises(StorageFailed, match="no seal of extent"):
            catalog.seal(name)


def test_put_replaces_and_drop_of_nothing_is_nothing(catalog):
    moved = put_extent(0)._replace(slot=Slot(7, 0, extent(0).slot_bytes), checksums=bytes(range(32)))
    catalog.commit([DropExtent("none"), DropDocument("no", "ne"), DropPin("no", "ne")])
    catalog.commit([put_extent(0), PutDocument(document("a", 0)), PutPin(pin("a"))])
    catalog.commit(
        [moved, PutDocument(document("a", 0, 1)), PutPin(pin("a", reason="new")), PutSpec(SPEC), PutSpec(SPEC)]
    )
    contents = reopened(catalog)
    assert contents.extents == ((moved.extent, moved.slot),)
    assert contents.documents == (document("a", 0, 1),)
    assert contents.pins == (pin("a", reason="new"),)


def test_records_apply_in_order(catalog):
    catalog.commit(
        [
            PutDocument(document("a", 0)),
            DropDocument("acme", "a"),
            PutDocument(document("b", 0)),
            DropExtent(extent(0).id),
            put_extent(0),
            put_extent(1),
            DropExtent(extent(1).id),
            PutPin(pin("b")),
            DropPin("acme", "b"),
        ]
    )
    contents = reopened(catalog)
    assert [found.id.name for found in contents.documents] == ["b"]
    assert [found.id for found, _ in contents.extents] == [extent(0).id]
    assert contents.pins == ()


def test_extents_of_no_document_are_dropped_and_reported_once(catalog):
    catalog.commit([put_extent(0), put_extent(1), put_extent(2), PutDocument(document("a", 0, 2))])
    contents = catalog.load()
    assert contents.orphans == (extent(1).id,)
    assert [found.id for found, _ in contents.extents] == [extent(0).id, extent(2).id]
    again = reopened(catalog)
    assert again.orphans == ()
    assert again.extents == contents.extents


def test_secrets_are_random_kept_and_durable(catalog, path):
    first, second = catalog.tenant_secret("a"), catalog.tenant_secret("b")
    assert len(first) == len(second) == 32
    assert first != second
    other = Catalog(path)  # sees only what is committed
    assert other.load().tenants == {"a": first, "b": second}
    other.close()
    assert catalog.tenant_secret("a") == first


def test_a_failed_commit_changes_nothing_and_the_next_works(catalog):
    catalog.commit([put_extent(0), PutDocument(document("a", 0))])
    before = catalog.load()
    pages = catalog._database.execute("PRAGMA page_count").fetchone()[0]
    catalog._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be out of space
    big = replace(document("big"), extents=tuple(f"{index:032x}:0" for index in range(10_000)))
    with pytest.raises(StorageFailed, match="full"):
        catalog.commit([DropDocument("acme", "a"), DropExtent(extent(0).id), PutDocument(big)])
    assert catalog.load() == before
    catalog._database.execute(f"PRAGMA max_page_count = {1 << 30}")
    catalog.commit([PutDocument(big)])
    assert [found.id.name for found in catalog.load().documents] == ["a", "big"]


def test_a_bug_in_a_batch_changes_nothing(catalog):
    wrong = put_extent(1)._replace(slot=Slot(0, 0, 1))
    with pytest.raises(AssertionError):
        catalog.commit([PutDocument(document("a")), wrong])
    assert catalog.load() == EMPTY


def test_threads_take_turns(catalog):
    secrets = []

    def work(index):
        catalog.commit([PutDocument(document(f"{index}", index)), put_extent(index)])
        secrets.append(catalog.tenant_secret("shared"))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(secrets)) == 1
    assert len(catalog.load().extents) == 6


@pytest.mark.parametrize("version", [str(SCHEMA_VERSION + 1), "0"])
def test_an_unknown_version_is_refused_and_left_alone(catalog, version):
    catalog._database.execute("UPDATE meta SET value = ?", (version,))
    catalog.close()
    before = catalog.path.read_bytes()
    with pytest.raises(StorageFailed, match=f"schema version {version}.*knows {SCHEMA_VERSION}"):
        Catalog(catalog.path)
    assert catalog.path.read_bytes() == before


def test_somebody_elses_database_is_refused(path):
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE theirs (x)")
    database.close()
    with pytest.raises(StorageFailed, match=r"catalog.*meta"):
        Catalog(path)


def test_a_file_that_is_no_database_is_a_clear_error(path):
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StorageFailed, match=r"catalog .*not a database; restore it or move it away"):
        Catalog(path)


def test_a_path_that_cannot_be_opened_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="catalog"):
        Catalog(tmp_path / "file" / "catalog")
    with pytest.raises(StorageFailed, match="directory"):
        Catalog(tmp_path)


def test_damaged_pages_are_found(catalog, path):
    catalog.commit([put_extent(index) for index in range(200)])
    catalog.commit([PutDocument(document("a", *range(200)))])
    catalog.close()
    content = bytearray(path.read_bytes())
    for start in range(4096, len(content), 4096):
        content[start : start + 2000] = os.urandom(2000)
    path.write_bytes(content)
    with pytest.raises(StorageFailed, match=r"malformed|not a database"):
        Catalog(path).load()


def test_check_reports_what_load_may_not_see(catalog, path):
    catalog.commit([PutDocument(document(f"{index}", *range(50))) for index in range(100)])
    catalog.commit([DropDocument("acme", f"{index}") for index in range(100)])  # leaves a list of free pages
    catalog.close()
    content = bytearray(path.read_bytes())
    assert len(content) > 20 * 4096
    content[36:40] = (3).to_bytes(4, "big")  # the header's count of free pages
    path.write_bytes(content)
    damaged = Catalog(path)
    assert damaged.load() == EMPTY
    assert damaged.check()
    damaged.close()


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("documents", "write_policy", "sometimes"),
        ("documents", "extents", b"\xc1"),
        ("extents", "block_keys", "text"),
        ("pins", "floor", 9),
        ("specs", "spec", b"{}"),
        ("specs", "spec", b'{"dtype":"int3"}'),
        ("specs", "fingerprint", bytes(16)),
    ],
)
def test_a_row_that_is_not_ours_is_a_clear_error(catalog, table, column, value):
    catalog.commit([PutSpec(SPEC), put_extent(0), PutDocument(document("a", 0)), PutPin(pin("a"))])
    catalog._database.execute(f"UPDATE {table} SET {column} = ?", (value,))
    with pytest.raises(StorageFailed, match="a row that is not ours"):
        catalog.load()
    assert not catalog._database.in_transaction


RECORDS = st.one_of(
    st.integers(0, 4).map(put_extent),
    st.integers(0, 4).map(lambda index: DropExtent(extent(index).id)),
    st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 4), unique=True)).map(
        lambda made: PutDocument(document(made[0], *made[1]))
    ),
    st.sampled_from("ab").map(lambda name: DropDocument("acme", name)),
    st.sampled_from("ab").map(lambda name: PutPin(pin(name))),
    st.sampled_from("ab").map(lambda name: DropPin("acme", name)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(RECORDS, max_size=6), max_size=5))
def test_any_batches_equal_three_dictionaries(tmp_path_factory, batches):
    catalog = Catalog(tmp_path_factory.mktemp("catalog") / "file")
    extents, documents, pins = {}, {}, {}
    for batch in batches:
        catalog.commit(batch)
        for record in batch:
            match record:
                case PutExtent(extent=put):
                    extents[put.id] = put
                case DropExtent(extent=dropped):
                    extents.pop(dropped, None)
                case PutDocument(document=put):
                    documents[put.id] = put
                case DropDocument(tenant=tenant, name=name):
                    documents.pop(DocumentId(tenant, name), None)
                case PutPin(pin=put):
                    pins[put.document] = put
                case DropPin(tenant=tenant, name=name):
                    pins.pop(DocumentId(tenant, name), None)
    contents = reopened(catalog)
    needed = set(itertools.chain.from_iterable(found.extents for found in documents.values()))
    assert contents.documents == tuple(documents[key] for key in sorted(documents))
    assert contents.pins == tuple(pins[key] for key in sorted(pins))
    assert {found.id for found, _ in contents.extents} == extents.keys() & needed
    assert set(contents.orphans) == extents.keys() - needed


# Commits documents of three extents each, drops the one before, and says so after every commit.
WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_catalog import *
catalog = Catalog(Path(sys.argv[3]))
for number in range(10_000):
    first = number % 50 * 3
    indices = (first, first + 1, first + 2)
    records = [*map(put_extent, indices), PutDocument(document(f"{number}", *indices))]
    if number:
        records += [DropDocument("acme", f"{number - 1}")]
        records += [DropExtent(extent(index).id) for index in range(150) if index not in indices]
    catalog.commit(records)
    print(number, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 20])
def test_sigkill_in_the_middle_of_commits_leaves_whole_transactions(path, acknowledged):
    here = os.path.dirname(__file__)  # noqa: PTH120 - a string for argv
    arguments = [sys.executable, "-c", WRITER, here, os.path.dirname(here), path]  # noqa: PTH120 - as above
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
        lines = [writer.stdout.readline() for _ in range(acknowledged)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
    last = int([line for line in lines if line.endswith("\n")][-1])
    catalog = Catalog(path)
    assert catalog.check() == []
    contents = catalog.load()
    catalog.close()
    (found,) = contents.documents
    assert int(found.id.name) in (last, last + 1), "acknowledged, or the one in flight"
    assert sorted(entry.id for entry, _ in contents.extents) == sorted(found.extents)
    assert contents.orphans == ()
