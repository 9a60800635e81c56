"""The admin API: every route's good day and its refusals, over a real service whose orders end when told to."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest
from aiohttp.test_utils import TestClient, TestServer
from holdfast.kvstore import problems
from holdfast.kvstore.admin import BODY_BYTES_MAX, make_app
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import HoldfastError, StorageFailed, all_errors
from holdfast.kvstore.orders import DropDocument
from holdfast.kvstore.quotas import Quotas
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.state import Backend
from holdfast.kvstore.wire import PROTOCOL_VERSION

from fakes import CLIENT, EXTENT_BYTES, EXTENT_TOKENS, FAR_NS, ingest, tiny_config, tiny_service, tiny_spec

ROUTES = {
    "GET /livez",
    "GET /metrics",
    "GET /readyz",
    "GET /v1/bypass",
    "PUT /v1/bypass",
    "DELETE /v1/bypass",
    "GET /v1/calibration",
    "POST /v1/calibration",
    "GET /v1/documents",
    "GET /v1/documents/{tenant}/{name}",
    "GET /v1/documents/{tenant}/{name}/explain",
    "DELETE /v1/documents/{tenant}/{name}",
    "PATCH /v1/documents/{tenant}/{name}",
    "GET /v1/objects",
    "GET /v1/objects/{tenant}/{namespace}",
    "DELETE /v1/objects/{tenant}/{namespace}",
    "POST /v1/objects/{tenant}/{namespace}/pin",
    "POST /v1/objects/{tenant}/{namespace}/unpin",
    "GET /v1/evictions",
    "POST /v1/evictions",
    "GET /v1/groups",
    "GET /v1/hints",
    "POST /v1/hints",
    "DELETE /v1/hints/{tenant}/{name}",
    "GET /v1/leases",
    "POST /v1/lookup",
    "GET /v1/models",
    "DELETE /v1/models/{model}",
    "GET /v1/pins",
    "POST /v1/pins",
    "POST /v1/pins/unpin",
    "DELETE /v1/pins/{tenant}/{name}",
    "GET /v1/status",
    "GET /v1/swaps",
    "GET /v1/tenants",
    "GET /v1/tiers",
    "GET /v1/uses",
    "GET /v1/version",
}


class Api:
    """A client and the service behind it."""

    def __init__(self, client, service, effects, clock, not_ready):
        self.client = client
        self.service = service
        self.effects = effects
        self.clock = clock
        self.not_ready = not_ready

    async def get(self, path):
        async with self.client.get(path) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "application/json"
            return await response.json()

    async def refused(self, method, path, status, code, **request):
        """The request is refused with this status and code; returns the problem."""
        async with self.client.request(method, path, **request) as response:
            assert response.status == status, await response.text()
            assert response.content_type == "application/problem+json"
            problem = await response.json(content_type=None)
        assert set(problem) - {"holders"} == {"type", "title", "status", "detail", "instance", "code"}
        assert problem["type"] == f"urn:holdfast:error:{code}"
        assert problem["code"] == code
        assert problem["status"] == status
        assert problem["instance"] == path.partition("?")[0]
        assert problem["title"]
        assert problem["detail"]
        return problem

    def settling(self):
        """From now on orders end by themselves."""
        self.effects.submitted = lambda: asyncio.get_running_loop().call_soon(self.effects.complete_all, self.service)

    def ingest(self, name, **options):
        return ingest(self.service, self.effects, name, **options)

    def attach(self, document):
        granted = []
        attach = self.service.attach(CLIENT, document, None, None, None, FAR_NS, granted.append)
        self.effects.complete_all(self.service)
        assert granted == [attach]
        return attach


@asynccontextmanager
async def running(**overrides):
    service, effects, clock = tiny_service(tiny_config(**overrides))
    not_ready = [None]
    async with TestClient(TestServer(make_app(service, lambda: not_ready[0], "tmpfs, at /arena"))) as client:
        yield Api(client, service, effects, clock, not_ready)
    service.state.check()


@pytest.fixture
async def api():
    async with running() as found:
        yield found


# The surface -----------------------------------------------------------------------------------


def test_golden_routes():
    service, _, _ = tiny_service()
    app = make_app(service, lambda: None, "tmpfs, at /arena")
    found = {f"{r.method} {r.resource.canonical}" for r in app.router.routes() if r.method != "HEAD"}
    assert found == ROUTES


def leaves():
    return [kind for kind in all_errors().values() if not kind.__subclasses__()]


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.code)
def test_every_error_has_a_status(kind):
    assert any(base in problems.STATUS for base in kind.__mro__)
    assert 400 <= problems.status_of(kind) <= 599


def test_a_new_error_without_a_status_would_be_noticed():
    class Planted(HoldfastError):
        code = "planted"

    assert not any(base in problems.STATUS for base in Planted.__mro__)
    assert problems.status_of(Planted) == 500
    assert HoldfastError not in problems.STATUS


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid-name", 400),
        ("frame-too-large", 413),
        ("document-not-found", 404),
        ("in-use", 409),
        ("pins-overcommitted", 409),
        ("no-capacity", 507),
        ("draining", 503),
        ("deadline-exceeded", 504),
        ("storage-failed", 500),
    ],
)
def test_statuses_people_rely_on(code, status):
    assert problems.status_of(all_errors()[code]) == status


# Health ----------------------------------------------------------------------------------------


async def test_health(api):
    assert await api.get("/livez") == {"status": "ok"}
    assert await api.get("/readyz") == {"status": "ok"}
    api.not_ready[0] = "the catalog is being read"
    assert await api.get("/livez") == {"status": "ok"}
    problem = await api.refused("GET", "/readyz", 503, "unavailable")
    assert problem["detail"] == "the catalog is being read"


async def test_commands_wait_until_ready_but_looking_does_not(api):
    document = api.ingest("a")
    api.not_ready[0] = "draining"
    assert (await api.get("/v1/documents"))["documents"]
    assert (await api.get("/v1/status"))["not_ready"] == "draining"
    await api.refused("DELETE", "/v1/documents/default/a", 503, "unavailable")
    await api.refused("POST", "/v1/pins", 503, "unavailable", json={"document": "a"})
    await api.refused("DELETE", "/v1/pins/default/a", 503, "unavailable")
    await api.refused("POST", "/v1/evictions", 503, "unavailable", json={"document": "a"})
    assert document in api.service.state.documents


async def test_metrics(api):
    async with api.client.get("/metrics") as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        assert 'holdfast_tier_capacity_bytes{device="ddr",tier="ddr"} 1.048576e+06' in await response.text()


async def test_version_and_status(api):
    found = await api.get("/v1/version")
    assert found["api"] == "v1"
    assert found["protocol"] == PROTOCOL_VERSION
    document = api.ingest("a")
    api.attach(document)
    status = await api.get("/v1/status")
    assert status["version"] == found["version"]
    assert status["not_ready"] is None
    assert (status["documents"], status["leases"], status["leases_overdue"], status["pins"]) == (1, 1, 0, 0)
    assert [tier["tier"] for tier in status["tiers"]] == ["ddr", "nvme"]
    assert status["groups"] == []
    assert status["ddr_backing"] == "tmpfs, at /arena"
    assert status["relieving"] == []
    next(iter(api.service.watermarks.marks.values())).relieving = True
    assert (await api.get("/v1/status"))["relieving"] == ["ddr"]


# Documents -------------------------------------------------------------------------------------


async def test_documents_are_listed_in_order(api):
    for name in ("b", "a"):
        api.ingest(name, token_count=100)
    api.ingest("c", tenant="acme", write_policy=WritePolicy.MEMORY)
    found = await api.get("/v1/documents")
    assert [(d["tenant"], d["name"]) for d in found["documents"]] == [("acme", "c"), ("default", "a"), ("default", "b")]
    assert found["next_cursor"] is None
    shown = found["documents"][1]
    assert shown["token_count"] == 100
    assert shown["size_bytes"] == 4 * EXTENT_BYTES
    assert shown["resident_bytes"] == {"ddr": 4 * EXTENT_BYTES, "nvme": 4 * EXTENT_BYTES}
    assert shown["durable"] is True
    assert shown["complete"] is True
    assert shown["missing_tokens"] == []
    assert found["documents"][0]["durable"] is False


async def test_document_filters(api):
    api.ingest("a")
    pinned = api.ingest("b")
    api.ingest("c", tenant="acme", write_policy=WritePolicy.MEMORY)
    api.service.pin(pinned, Tier.DDR, None, "me", "")
    api.effects.complete_all(api.service)

    async def names(query):
        return [d["name"] for d in (await api.get(f"/v1/documents?{query}"))["documents"]]

    assert await names("tenant=default") == ["a", "b"]
    assert await names("tenant=nobody") == []
    assert await names("tier=nvme") == ["a", "b"]
    assert await names("tier=ddr") == ["c", "a", "b"]
    assert await names("tier=hbm") == []
    assert await names("pinned=true") == ["b"]
    assert await names("pinned=false") == ["c", "a"]
    assert await names("pinned=false&tenant=default&tier=nvme") == ["a"]


async def test_documents_come_in_pages(api):
    for index in range(5):
        api.ingest(f"doc {index}", token_count=10)
    found, cursor, pages = [], "", 0
    while cursor is not None:
        page = await api.get(f"/v1/documents?limit=2{cursor and f'&cursor={quote(cursor)}'}")
        found += [d["name"] for d in page["documents"]]
        cursor = page["next_cursor"]
        pages += 1
    assert found == [f"doc {index}" for index in range(5)]
    assert pages == 3


async def test_a_filter_that_matches_nothing_ends_its_page_early(api, monkeypatch):
    monkeypatch.setattr("holdfast.kvstore.admin.SCAN_MAX", 2)
    for index in range(3):
        api.ingest(f"{index}", token_count=10)
    page = await api.get("/v1/documents?tier=hbm")
    assert page["documents"] == []
    rest = await api.get(f"/v1/documents?tier=hbm&cursor={quote(page['next_cursor'])}")
    assert rest == {"documents": [], "next_cursor": None}


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "tier=tape", "pinned=maybe", "colour=red", "cursor=%21", "cursor=YQ=="],
)
async def test_a_bad_query_is_refused(api, query):
    await api.refused("GET", f"/v1/documents?{query}", 400, "invalid-request")


async def test_one_document(api):
    api.ingest("a", token_count=EXTENT_TOKENS + 8)
    found = await api.get("/v1/documents/default/a")
    assert found["document"]["name"] == "a"
    assert [(e["start"], e["stop"]) for e in found["extents"]] == [(0, 32), (32, 40)]
    for extent in found["extents"]:
        assert extent["copies"] == {"ddr": "resident", "nvme": "resident"}
        assert extent["scores"]
        assert extent["standing"]["tier"] == "ddr"
        assert 0 <= extent["standing"]["ahead"] <= extent["standing"]["in_line"]
    await api.refused("GET", "/v1/documents/default/zzz", 404, "document-not-found")
    await api.refused("GET", "/v1/documents/acme/a", 404, "document-not-found")


@pytest.mark.parametrize("name", ["a b", "100%", "what?", "x#y", "{z}", "naïve ☃", "a+b&c=d", "..x"])
async def test_any_allowed_name_can_be_named(api, name):
    api.ingest(name, token_count=10)
    assert (await api.get(f"/v1/documents/default/{quote(name, safe='')}"))["document"]["name"] == name


async def test_a_document_gets_an_end_and_loses_it_again(api):
    api.ingest("a")
    path = "/v1/documents/default/a"
    submitted = asyncio.Event()
    api.effects.submitted = submitted.set
    changing = asyncio.create_task(api.client.patch(path, json={"ttl_seconds": 10}))
    await submitted.wait()
    assert not changing.done(), "answered when a restart would know it too"
    api.effects.complete_all(api.service)
    async with await changing as response:
        assert response.status == 200
        found = (await response.json())["document"]["expires_wall_ns"]
    assert found == api.clock.wall_ns() + 10 * 10**9
    await api.refused("PATCH", path, 400, "invalid-request", json={"ttl_seconds": 0})
    await api.refused("PATCH", path, 400, "invalid-request", json={})
    await api.refused("PATCH", "/v1/documents/default/b", 404, "document-not-found", json={"ttl_seconds": 1})


async def test_delete_is_answered_when_the_catalog_has_forgotten(api):
    document = api.ingest("a")
    submitted = asyncio.Event()
    api.effects.submitted = submitted.set
    deleting = asyncio.create_task(api.client.delete("/v1/documents/default/a"))
    await submitted.wait()
    assert document not in api.service.state.documents
    await api.get("/v1/status")  # a turn of the loop later it still waits
    assert not deleting.done()
    api.effects.complete_all(api.service)
    async with await deleting as response:
        assert response.status == 204
        assert await response.read() == b""
    assert not api.service.state.extents
    await api.refused("DELETE", "/v1/documents/default/a", 404, "document-not-found")


async def test_a_deletion_that_the_catalog_refuses_is_an_error_and_tried_again(api):
    document = api.ingest("a")
    api.effects.submitted = lambda: asyncio.get_running_loop().call_soon(refuse)

    def refuse():
        for order in list(api.effects.orders):
            api.effects.fail(api.service, order, StorageFailed("full"))

    await api.refused("DELETE", "/v1/documents/default/a", 500, "storage-failed")
    assert document not in api.service.state.documents
    api.effects.submitted = lambda: None
    api.service.tick()
    assert any(DropDocument(*document) in order.records for order in api.effects.orders)
    api.effects.complete_all(api.service)


async def test_delete_of_what_is_pinned_or_leased_is_refused(api):
    document = api.ingest("a")
    api.service.pin(document, Tier.NVME, None, "me", "")
    problem = await api.refused("DELETE", "/v1/documents/default/a", 409, "in-use")
    assert "unpin" in problem["detail"]
    assert [holder["kind"] for holder in problem["holders"]] == ["pin"]
    api.service.unpin(document)
    attach = api.attach(document)
    problem = await api.refused("DELETE", "/v1/documents/default/a", 409, "in-use")
    assert "leased" in problem["detail"]
    assert [(holder["kind"], holder["owner"]) for holder in problem["holders"]] == [("lease", f"client {CLIENT}")]
    api.service.detach(CLIENT, attach.lease.id)
    assert document in api.service.state.documents


# Pins ------------------------------------------------------------------------------------------


async def test_pins(api):
    api.ingest("a", token_count=64)
    api.settling()
    wanted = {"document": "a", "tier": "ddr", "ttl_seconds": 60, "owner": "ops", "reason": "launch"}
    async with api.client.post("/v1/pins", json=wanted) as response:
        assert response.status == 201
        pin = await response.json()
    assert pin["tenant"] == "default"
    assert (pin["document"], pin["tier"], pin["owner"], pin["reason"]) == ("a", "ddr", "ops", "launch")
    assert pin["expires_wall_ns"] - pin["created_wall_ns"] == 60 * 10**9
    found = await api.get("/v1/pins")
    assert found == {
        "pins": [pin],
        "pinned_bytes": 2 * EXTENT_BYTES,
        "budget_bytes": (5 << 20) // 2,
        "ddr_pinned_bytes": 2 * EXTENT_BYTES,
        "ddr_budget_bytes": 3 << 18,
    }
    assert (await api.get("/v1/documents/default/a"))["document"]["pin"] == pin
    async with api.client.delete("/v1/pins/default/a") as response:
        assert response.status == 200
        assert await response.json() == pin
    assert (await api.get("/v1/pins"))["pins"] == []
    await api.refused("DELETE", "/v1/pins/default/a", 404, "claim-not-found")


async def test_a_pin_ends_unless_told_otherwise(api):
    api.ingest("a")
    api.settling()
    async with api.client.post("/v1/pins", json={"document": "a"}) as response:
        pin = await response.json()
    assert pin["expires_wall_ns"] - pin["created_wall_ns"] == 3600 * 10**9
    async with api.client.post("/v1/pins", json={"document": "a", "ttl_seconds": None}) as response:
        assert (await response.json())["expires_wall_ns"] is None
    assert len((await api.get("/v1/pins"))["pins"]) == 1


async def test_a_pin_beyond_the_budget_changes_nothing():
    async with running(limits__pin_bytes="32 KiB") as api:
        api.ingest("a", token_count=64)
        api.ingest("b", token_count=64)
        api.settling()
        async with api.client.post("/v1/pins", json={"document": "a"}) as response:
            assert response.status == 201
        problem = await api.refused("POST", "/v1/pins", 409, "pins-overcommitted", json={"document": "b"})
        assert "default/a" in problem["detail"]
        (holder,) = problem["holders"]
        assert (holder["kind"], holder["document"], holder["size_bytes"]) == ("pin", "a", 2 * EXTENT_BYTES)
        assert [pin["document"] for pin in (await api.get("/v1/pins"))["pins"]] == ["a"]


@pytest.mark.parametrize(
    "sent",
    [
        {"document": "a", "tier": "tape"},
        {"document": "a", "ttl_seconds": 0},
        {"document": "a", "ttl_seconds": -1},
        {"document": "a", "ttl_seconds": "1h"},
        {"document": "a", "reason": "x" * 256},
        {"document": "a", "colour": "red"},
        {"document": 3},
        {},
        [],
    ],
)
async def test_a_bad_pin_is_refused(api, sent):
    api.ingest("a")
    await api.refused("POST", "/v1/pins", 400, "invalid-request", json=sent)
    assert not api.service.state.pins.all()


async def test_a_pin_is_answered_when_the_catalog_has_it(api):
    api.ingest("a")
    submitted = asyncio.Event()
    api.effects.submitted = submitted.set
    pinning = asyncio.create_task(api.client.post("/v1/pins", json={"document": "a", "tier": "nvme"}))
    await submitted.wait()
    await api.get("/v1/status")  # a turn of the loop later it still waits
    assert not pinning.done()
    api.effects.complete_all(api.service)
    async with await pinning as response:
        assert response.status == 201


async def test_a_pin_that_the_catalog_refuses_is_an_error_and_holds(api):
    document = api.ingest("a")

    def refuse():
        for order in list(api.effects.orders):
            api.effects.fail(api.service, order, StorageFailed("full"))

    api.effects.submitted = lambda: asyncio.get_running_loop().call_soon(refuse)
    await api.refused("POST", "/v1/pins", 500, "storage-failed", json={"document": "a", "tier": "nvme"})
    assert api.service.state.pins.get(document) is not None


async def test_soft_pins_show_their_strength_and_what_is_left(api):
    api.ingest("a")
    api.settling()
    wanted = {"document": "a", "kind": "soft", "ttl_seconds": 100, "refresh": "hit"}
    async with api.client.post("/v1/pins", json=wanted) as response:
        assert (await response.json())["strength"] == 1.0
    api.clock.advance(60 * 10**9)
    (pin,) = (await api.get("/v1/pins"))["pins"]
    assert (pin["kind"], pin["refresh"], pin["strength"], pin["remaining_seconds"]) == ("soft", "hit", 0.5, 40.0)


async def test_many_pins_end_in_one_call(api):
    for name, owner in (("a", "ann"), ("b", "bob"), ("c", "bob")):
        api.service.pin(api.ingest(name), Tier.NVME, None, owner, f"demo of {name}")
    api.settling()

    async def unpin(**wanted):
        async with api.client.post("/v1/pins/unpin", json=wanted) as response:
            assert response.status == 200, await response.text()
            found = await response.json()
        return found["state"], [pin["document"] for pin in found["pins"]]

    assert await unpin(owner="bob", dry_run=True) == ("planned", ["b", "c"])
    assert len((await api.get("/v1/pins"))["pins"]) == 3
    assert len((await api.get("/v1/pins?owner=bob&reason_prefix=demo%20of%20c"))["pins"]) == 1
    assert await unpin(documents=["a", "default/b"], owner="bob") == ("done", ["b"])
    for wrong in ({}, {"everything": True, "owner": "bob"}, {"dry_run": True}):
        await api.refused("POST", "/v1/pins/unpin", 400, "invalid-request", json=wrong)
    assert await unpin(everything=True) == ("done", ["a", "c"])
    assert await unpin(everything=True) == ("done", [])


async def test_overdue_leases_are_found(api):
    api.service.introduce(CLIENT, 4711)
    api.attach(api.ingest("a", token_count=64))
    api.clock.advance(200 * 10**9)
    api.attach(api.ingest("b"))
    assert (await api.get("/v1/leases?overdue=true"))["leases"] == []
    api.clock.advance(150 * 10**9)
    (lease,) = (await api.get("/v1/leases?overdue=true"))["leases"]
    assert (lease["document"], lease["pid"], lease["tier"]) == ("a", 4711, "ddr")
    assert (lease["size_bytes"], lease["age_seconds"], lease["remaining_seconds"]) == (2 * EXTENT_BYTES, 350, -50)
    assert (await api.get("/v1/status"))["leases_overdue"] == 1


async def test_a_pin_of_an_unknown_document(api):
    await api.refused("POST", "/v1/pins", 404, "document-not-found", json={"document": "a"})


# Hints -----------------------------------------------------------------------------------------


async def test_announced_queries_are_shown_in_their_order_and_with_their_end(api):
    names = ("a", "b", "c")
    for name in names:
        document = api.ingest(name)
        api.service.evict(document, Tier.DDR, 0, FAR_NS, lambda _: None)
        api.effects.complete_all(api.service)
    for name, queries in zip(names, (1, 2, 5), strict=True):
        wanted = {"document": name, "queries": queries, "owner": "me", "deadline_seconds": 60}
        async with api.client.post("/v1/hints", json=wanted) as response:
            assert response.status == 201
            assert (await response.json())["target"] == "ddr"
    shown = await api.get("/v1/hints")
    assert [(h["document"], h["state"], h["position"]) for h in shown["hints"]] == [
        ("a", "moving", None),
        ("c", "waiting", 0),
        ("b", "waiting", 1),
    ]
    assert shown["queries_waiting"] == 8
    assert all(h["predicted_ns"] > 0 and h["remaining_seconds"] == 60 for h in shown["hints"])
    async with api.client.delete("/v1/hints/default/b?owner=me") as response:
        assert response.status == 204
    api.effects.complete_all(api.service)
    api.attach(DocumentId("default", "c"))
    shown = await api.get("/v1/hints?limit=5")
    assert [(h["document"], h["state"]) for h in shown["hints"]] == [("a", "promoted")]
    assert [(h["document"], h["state"]) for h in shown["ended"]] == [("c", "used"), ("b", "cancelled")]
    assert shown["counts"]["hints_in_time"] == 1
    assert (await api.get("/v1/hints?limit=0"))["ended"] == []


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"document": "nobody"}, 404, "document-not-found"),
        ({"group": "nobody"}, 404, "group-not-found"),
        ({"queries": 0}, 400, "invalid-request"),
        ({"deadline_seconds": 4000}, 400, "invalid-request"),
    ],
)
async def test_what_is_no_hint_is_refused(api, change, status, code):
    api.ingest("a")
    await api.refused("POST", "/v1/hints", status, code, json={"document": "a"} | change)


# Bodies and routes -----------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", ["/v1/pins", "/v1/evictions"])
async def test_a_body_is_json_small_and_known(api, path):
    for raw in (b"", b"{", b"nonsense", b'{"document": "\xff"}', b"null"):
        await api.refused("POST", path, 400, "invalid-request", data=raw, headers=JSON)
    problem = await api.refused("POST", path, 400, "invalid-request", json={"document": "a", "colour": "red"})
    assert "colour" in problem["detail"]
    huge = b" " * (BODY_BYTES_MAX + 1)
    await api.refused("POST", path, 413, "body-too-large", data=huge, headers=JSON)
    text = {"Content-Type": "text/plain"}
    await api.refused("POST", path, 415, "unsupported-media-type", data=b'{"document": "a"}', headers=text)


async def test_a_body_that_does_not_arrive_is_not_waited_for(api, monkeypatch):
    monkeypatch.setattr("holdfast.kvstore.problems.BODY_SECONDS_MAX", 0.05)
    refused = asyncio.Event()

    async def slow():
        yield b"{"
        await refused.wait()

    await api.refused("POST", "/v1/pins", 504, "deadline-exceeded", data=slow(), headers=JSON)
    refused.set()


async def test_routes_that_are_not(api):
    for path in ("/", "/v1", "/v1/documents/default", "/v2/tiers", "/v1/documents/a/b/c"):
        await api.refused("GET", path, 404, "no-such-route")
    await api.refused("PUT", "/v1/pins", 405, "method-not-allowed")
    async with api.client.put("/v1/pins") as response:
        assert response.headers["Allow"] == "GET,HEAD,POST"


# Evictions -------------------------------------------------------------------------------------


async def test_a_dry_run_changes_nothing(api):
    api.ingest("a", token_count=64)
    before = await api.get("/v1/documents/default/a")
    async with api.client.post("/v1/evictions", json={"document": "a", "dry_run": True}) as response:
        assert response.status == 200
        found = await response.json()
    assert found["state"] == "planned"
    assert found["size_bytes"] == 2 * EXTENT_BYTES
    assert [(v["tier"], v["action"], v["start"]) for v in found["plan"]] == [
        ("ddr", "demote", 32),
        ("ddr", "demote", 0),
    ]
    assert found["plan"][0]["documents"] == ["default/a"]
    assert await api.get("/v1/documents/default/a") == before
    assert not api.effects.orders


async def test_an_eviction_waits_until_it_is_done(api):
    document = api.ingest("a", token_count=64, write_policy=WritePolicy.BACK)
    api.settling()
    async with api.client.post("/v1/evictions", json={"document": "a"}) as response:
        assert response.status == 200
        found = await response.json()
    assert found["state"] == "done"
    assert len(found["plan"]) == 2
    shown = (await api.get("/v1/documents/default/a"))["document"]
    assert shown["resident_bytes"] == {"nvme": 2 * EXTENT_BYTES}
    assert document in api.service.state.documents
    log = (await api.get("/v1/evictions"))["evictions"]
    assert [(v["start"], v["tier"], v["reason"]) for v in log] == [(0, "ddr", "admin"), (32, "ddr", "admin")]
    assert len((await api.get("/v1/evictions?limit=1"))["evictions"]) == 1


async def test_an_eviction_past_its_deadline_goes_on(api):
    api.ingest("a", token_count=64, write_policy=WritePolicy.BACK)
    ordered = asyncio.Event()
    api.effects.submitted = ordered.set
    wanted = {"document": "a", "deadline_seconds": 5}
    request = asyncio.create_task(api.client.post("/v1/evictions", json=wanted))
    await ordered.wait()
    api.clock.advance(5 * 10**9)
    api.service.tick()
    async with await request as response:
        assert response.status == 202
        assert (await response.json())["state"] == "running"
    api.effects.complete_all(api.service)
    assert (await api.get("/v1/documents/default/a"))["document"]["resident_bytes"] == {"nvme": 2 * EXTENT_BYTES}


async def test_a_caller_that_goes_away_leaves_the_eviction_running(api):
    api.ingest("a", token_count=64, write_policy=WritePolicy.BACK)
    ordered = asyncio.Event()
    api.effects.submitted = ordered.set
    request = asyncio.create_task(api.client.post("/v1/evictions", json={"document": "a"}))
    await ordered.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    api.effects.complete_all(api.service)
    assert (await api.get("/v1/documents/default/a"))["document"]["resident_bytes"] == {"nvme": 2 * EXTENT_BYTES}


async def test_evicting_bytes(api):
    for name in "abc":
        api.ingest(name, token_count=64)
    async with api.client.post("/v1/evictions", json={"bytes": 3 * EXTENT_BYTES, "to": "nvme"}) as response:
        assert response.status == 200
        found = await response.json()
    assert found["state"] == "done"
    assert found["size_bytes"] >= 3 * EXTENT_BYTES
    ddr = (await api.get("/v1/tiers"))["tiers"][0]
    assert ddr["used_bytes"] == 6 * EXTENT_BYTES - found["size_bytes"]


async def test_evicting_out_of_nvme_drops(api):
    api.ingest("a", token_count=64)
    api.settling()
    async with api.client.post("/v1/evictions", json={"document": "a", "to": "none"}) as response:
        assert response.status == 200
        assert (await response.json())["state"] == "done"
    shown = (await api.get("/v1/documents/default/a"))["document"]
    assert shown["resident_bytes"] == {}
    assert shown["complete"] is False
    assert shown["missing_tokens"] == [[0, 64]]


async def test_evicting_what_is_leased_or_pinned_is_refused(api):
    document = api.ingest("a", token_count=64)
    attach = api.attach(document)
    for dry_run in (True, False):
        problem = await api.refused("POST", "/v1/evictions", 409, "in-use", json={"document": "a", "dry_run": dry_run})
        assert "leased" in problem["detail"]
    await api.refused("POST", "/v1/evictions", 507, "no-capacity", json={"bytes": 1})
    api.service.detach(CLIENT, attach.lease.id)
    api.service.pin(document, Tier.DDR, None, "ops", "launch")
    problem = await api.refused("POST", "/v1/evictions", 409, "in-use", json={"document": "a"})
    assert "ops" in problem["detail"]
    assert "launch" in problem["detail"]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"document": "a", "bytes": 1},
        {"tenant": "acme", "bytes": 1},
        {"bytes": 0},
        {"bytes": 1, "to": "ddr"},
        {"document": "a", "to": "hbm"},
        {"bytes": "1 GiB"},
        {"document": "a", "deadline_seconds": 601},
        {"document": "a", "deadline_seconds": -1},
        {"document": "a", "dry_run": "yes"},
    ],
)
async def test_a_bad_eviction_is_refused(api, sent):
    api.ingest("a")
    await api.refused("POST", "/v1/evictions", 400, "invalid-request", json=sent)
    await api.refused("POST", "/v1/evictions", 404, "document-not-found", json={"document": "b"})


async def test_a_write_that_fails_is_a_verdict_and_the_eviction_ends(api):
    api.ingest("a", token_count=10, write_policy=WritePolicy.BACK)
    ordered = asyncio.Event()
    api.effects.submitted = ordered.set
    request = asyncio.create_task(api.client.post("/v1/evictions", json={"document": "a"}))
    await ordered.wait()
    (order,) = api.effects.orders
    api.effects.fail(api.service, order, StorageFailed("no space left"))
    api.effects.complete_all(api.service)
    async with await request as response:
        assert response.status == 200
        assert (await response.json())["state"] == "done"
    newest = (await api.get("/v1/evictions"))["evictions"][0]
    assert newest["action"] == "drop"
    assert "no space left" in newest["reason"]


# The rest --------------------------------------------------------------------------------------


async def test_tiers(api):
    api.ingest("a", token_count=64)
    ddr, nvme = (await api.get("/v1/tiers"))["tiers"]
    assert ddr == {
        "tier": "ddr",
        "device": "ddr",
        "capacity_bytes": 1 << 20,
        "used_bytes": 2 * EXTENT_BYTES,
        "leased_bytes": 0,
        "pinned_bytes": 0,
        "fragmented_bytes": 2 * EXTENT_BYTES,
        "withdrawn_bytes": 0,
        "written_bytes": {},
        "write_amplification": None,
    }
    assert (nvme["tier"], nvme["capacity_bytes"]) == ("nvme", 4 << 20)
    assert nvme["written_bytes"] == {"write-through": 2 * EXTENT_BYTES, "demotion": 0}


async def test_swaps_and_leases(api):
    first, second = api.ingest("a", token_count=64), api.ingest("b", token_count=64)
    attach = api.attach(first)
    api.attach(second)
    leases = (await api.get("/v1/leases"))["leases"]
    assert [lease["document"] for lease in leases] == ["a", "b"]
    assert leases[0]["id"] == attach.lease.id
    assert leases[0]["overdue"] is False
    assert leases[0]["remaining_seconds"] == 300.0
    swaps = (await api.get("/v1/swaps"))["swaps"]
    assert [swap["document"] for swap in swaps] == ["default/b", "default/a"]
    assert swaps[1]["source_tier"] == "ddr"
    assert swaps[1]["outcome"] == "ready"
    assert [s["document"] for s in (await api.get("/v1/swaps?limit=1"))["swaps"]] == ["default/b"]
    await api.refused("GET", "/v1/swaps?limit=0", 400, "invalid-request")
    api.clock.advance(301 * 10**9)
    assert (await api.get("/v1/leases"))["leases"][0]["overdue"] is True


async def test_groups(api):
    assert await api.get("/v1/groups") == {"groups": []}
    fingerprint = tiny_spec().fingerprint()
    api.service.register_rank(3, "left", 0, 2, 1, fingerprint, 128)
    (group,) = (await api.get("/v1/groups"))["groups"]
    assert (group["name"], group["model"], group["cp"], group["tp"]) == ("left", "tiny@1", 2, 1)
    assert (group["ranks_registered"], group["complete"]) == (1, False)
    assert group["capacity_bytes"] == 128 * api.service.state.groups["left"].row_bytes
    devices = [tier["device"] for tier in (await api.get("/v1/tiers"))["tiers"]]
    assert devices == ["hbm:left", "ddr", "nvme"]
    assert (group["kernel"], group["communicator"], group["device"]) == ("", "", "")


async def test_a_group_says_what_its_ranks_compute_with(api):
    for rank in range(2):
        backend = Backend("cpu_flash", "gloo", f"cuda:{rank}")
        api.service.register_rank(3 + rank, "left", rank, 2, 1, tiny_spec().fingerprint(), 128, backend)
    (group,) = (await api.get("/v1/status"))["groups"]
    assert (group["kernel"], group["communicator"], group["device"]) == ("cpu_flash", "gloo", "cuda:0, cuda:1")


async def test_looking_never_perturbs(api):
    document = api.ingest("a")
    owner = api.service.state.document(document)
    records = [api.service.state.extents[extent] for extent in owner.document.extents]
    api.clock.advance(10**9)
    before = [api.service.planner.explain(record, record.ddr) for record in records]
    uses = owner.use_count, owner.last_use_ns
    for path in sorted(route.removeprefix("GET ") for route in ROUTES if route.startswith("GET ")):
        async with api.client.get(path.format(tenant="default", name="a", namespace="ns")) as response:
            assert response.status == 200, path
    assert [api.service.planner.explain(record, record.ddr) for record in records] == before
    assert (owner.use_count, owner.last_use_ns) == uses
    assert not api.service.state.leases
    assert not api.effects.orders


# Tenants ---------------------------------------------------------------------------------------


async def test_tenants_and_their_quotas(api):
    api.ingest("a", token_count=64, tenant="acme")
    api.service.pin(api.ingest("b", token_count=32), Tier.DDR, None, "me", "test")
    api.attach(DocumentId("acme", "a"))
    shown = await api.get("/v1/tenants")
    assert shown["count"] == 2
    acme, other = shown["tenants"]
    assert (acme["tenant"], acme["documents"], acme["quota"]) == ("acme", 1, None)
    assert [tier["tier"] for tier in acme["tiers"]] == ["hbm", "ddr", "nvme"]
    assert acme["tiers"][1] == {
        "tier": "ddr",
        "used_bytes": 2 * EXTENT_BYTES,
        "guaranteed_bytes": 0,
        "maximum_bytes": None,
        "fair_bytes": None,
        "pinned_bytes": 0,
        "leased_bytes": 2 * EXTENT_BYTES,
    }
    assert other["tiers"][1]["pinned_bytes"] == EXTENT_BYTES
    api.service.state.quotas = Quotas({"acme": TenantConfig(ddr_guaranteed_bytes=5), "new": TenantConfig()})
    shown = await api.get("/v1/tenants?limit=1")
    assert (shown["count"], len(shown["tenants"])) == (3, 1)
    fair_bytes = shown["tenants"][0]["tiers"][1]["fair_bytes"]
    assert fair_bytes == (1 << 20) - EXTENT_BYTES, "all but what the other uses, which is less than its half"
