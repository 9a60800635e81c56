"""Clearing a model: all that was stored for it goes at once, and nothing of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from holdfast.engine_adapter.api import connect
from holdfast.kvstore.errors import InvalidRequest, NotFound

from daemon_process import DaemonProcess, fetch, put
from fakes import tiny_spec

OURS = tiny_spec()
OTHERS = replace(OURS, model="another")


@pytest.fixture
def daemon():
    with DaemonProcess() as daemon:
        yield daemon.start()


def fill(daemon):
    """Documents of two models and two tenants; returns a client of each tenant."""
    clients = daemon.client(), daemon.client("acme")
    for client in clients:
        client.register_spec(OTHERS)
        for number in range(3):
            put(client, f"ours-{number}", 64, spec=OURS)
        put(client, "theirs", 64, spec=OTHERS)
    return clients


def names(client):
    return [view.name for view in client.documents()]


def test_one_model_goes_for_all_tenants_and_does_not_come_back(daemon):
    ours, acme = fill(daemon)
    with connect(daemon.socket) as store:
        store.objects("engine").put([(b"key", b"payload")])  # no model's KV, as far as anybody can tell
    listed = {model["model"]: model["documents"] for model in daemon.rest().get("/v1/models")["models"]}
    assert listed == {OURS.model: 6, OTHERS.model: 2}
    path = f"/v1/models/{OURS.model}"
    planned = daemon.rest().delete(path, {"dry_run": "true"})
    assert (planned["state"], planned["deleted"]) == ("planned", 6)
    assert len(names(ours)) == 4
    assert daemon.rest().delete(path)["deleted"] == 6
    assert names(ours) == names(acme) == ["theirs"]
    used = daemon.used("ddr")
    daemon.restart()
    assert names(daemon.client()) == ["theirs"]
    assert daemon.used("ddr") <= used


def test_a_tenant_clears_its_own(daemon):
    ours, acme = fill(daemon)
    assert ours.clear_model([OURS.fingerprint()]) == 3
    assert names(ours) == ["theirs"]
    assert len(names(acme)) == 4
    assert daemon.rest().delete(f"/v1/models/{OURS.fingerprint().hex()}", {"tenant": "acme"})["deleted"] == 3
    assert names(acme) == ["theirs"]


def test_what_is_needed_stays_and_is_named(daemon):
    ours, _ = fill(daemon)
    ours.pin("ours-0")
    attached = ours.attach("ours-1")
    found = daemon.rest().delete(f"/v1/models/{OURS.model}", {"tenant": "default"})
    assert (found["deleted"], found["kept_count"]) == (1, 2)
    assert set(found["kept"]) == {"default/ours-0", "default/ours-1"}
    ours.detach(attached.lease)
    assert fetch(ours, "ours-0")


def test_named_documents_stay_where_only_unnamed_ones_are_meant(daemon):
    ours, _ = fill(daemon)
    assert ours.clear_model([OURS.fingerprint()], "unnamed") == 0
    assert len(names(ours)) == 4


def test_wrong_questions(daemon):
    fill(daemon)
    with pytest.raises(NotFound, match="model ls"):
        daemon.rest().delete("/v1/models/nobody")
    with pytest.raises(InvalidRequest):
        daemon.client().clear_model([OURS.fingerprint()], "most")
    with pytest.raises(InvalidRequest):
        daemon.rest().delete(f"/v1/models/{OURS.model}", {"scope": "most"})
