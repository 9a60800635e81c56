"""The endpoint that routers ask: how much of a prompt is here, and how near."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.kvstore.errors import InvalidRequest, NotFound

from daemon_process import DaemonProcess, durable, put, tokens_of, until
from fakes import tiny_spec

SPEC = tiny_spec()
BLOCK = SPEC.block_tokens


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess() as daemon:
        yield daemon.start()


def ask(daemon, tokens, **more):
    return daemon.rest().post("/v1/lookup", {"model": SPEC.model, "tokens": tokens} | more)


def test_a_prompt_is_found_as_far_as_it_is_here(daemon):
    client = daemon.client()
    tokens = tokens_of("report", 6 * BLOCK)
    put(client, "report", len(tokens))
    assert ask(daemon, tokens)["token_count"] == 6 * BLOCK
    other = [token + 1 for token in tokens[4 * BLOCK :]]
    found = ask(daemon, tokens[: 4 * BLOCK] + other)
    assert found["token_count"] == 4 * BLOCK
    assert found["tier_tokens"]["ddr"] == 4 * BLOCK
    assert (found["fingerprint"], found["page_format"]) == (SPEC.fingerprint().hex(), "")
    assert ask(daemon, other)["token_count"] == 0


def test_what_is_far_costs_more_to_load_and_nothing_is_brought_nearer(daemon):
    client = daemon.client()
    tokens = tokens_of("far", 6 * BLOCK)
    put(client, "far", len(tokens))
    assert ask(daemon, tokens)["load_seconds"] == 0
    until(lambda: durable(client, "far"), "it is durable")
    client.free("far", "nvme")
    for _ in range(2):
        found = ask(daemon, tokens)
        assert (found["token_count"], found["tier_tokens"]["nvme"]) == (6 * BLOCK, 6 * BLOCK)
        assert found["load_seconds"] > 0
        assert found["recompute_seconds"] > 0


def test_both_spellings_of_a_prompt_are_one(daemon):
    tokens = tokens_of("spelt", 4 * BLOCK)
    put(daemon.client(), "spelt", len(tokens))
    data = base64.b64encode(np.array(tokens, "<u4").tobytes()).decode()
    body = {"model": SPEC.fingerprint().hex(), "token_data": data}
    assert daemon.rest().post("/v1/lookup", body) == ask(daemon, tokens)


def test_extra_parts_and_tenants_are_told_apart(daemon):
    tokens = tokens_of("private", 4 * BLOCK)
    put(daemon.client(), "private", len(tokens))
    extras = [[0, base64.b64encode(b"salt").decode()]]
    assert ask(daemon, tokens)["token_count"] == 4 * BLOCK
    assert ask(daemon, tokens, extras=extras)["token_count"] == 0
    assert ask(daemon, tokens, tenant="other")["token_count"] == 0


def test_a_long_prompt_fits(daemon):
    tokens = tokens_of("long", 200_000)  # more than other bodies may have
    assert ask(daemon, tokens)["token_count"] == 0


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "nobody", "tokens": [1]}, NotFound),
        ({"model": SPEC.model}, InvalidRequest),
        ({"model": SPEC.model, "tokens": [1], "token_data": "AAAAAA=="}, InvalidRequest),
        ({"model": SPEC.model, "token_data": "AAAA"}, InvalidRequest),
        ({"model": SPEC.model, "tokens": []}, InvalidRequest),
        ({"model": SPEC.model, "tokens": [-1]}, InvalidRequest),
        ({"model": SPEC.model, "tokens": [1 << 31]}, InvalidRequest),
    ],
)
def test_wrong_questions(daemon, body, error):
    daemon.client()
    with pytest.raises(error):
        daemon.rest().post("/v1/lookup", body)


def test_a_namespace_of_objects_is_no_model(daemon):
    Store(daemon.client()).objects("pages").put([(b"key", b"value")])
    with pytest.raises(NotFound, match="/v1/models"):
        daemon.rest().post("/v1/lookup", {"model": "pages", "tokens": [0]})
