"""Prefixes by tokens, with a real daemon: found, leased and read without a name, also by its successors."""

import pytest
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DocumentNotFound, PrefixNotFound, SpecMismatch, TokenOutOfRange

from daemon_process import DaemonProcess, content_of, durable, put, tokens_of, until
from fakes import tiny_spec

SPEC = tiny_spec()  # blocks of 16 tokens, extents of two blocks
FINGERPRINT = SPEC.fingerprint()
TOKENS = tokens_of("talk", 128)


@pytest.fixture
def daemon():
    with DaemonProcess() as process:
        yield process


def store(client, count, policy=WritePolicy.THROUGH, tokens=TOKENS):
    """An unnamed document of the first tokens; returns its name."""
    opened = client.begin_ingest("", FINGERPRINT, tokens[:count], write_policy=policy)
    for part in opened.parts:
        client.view(part)[:] = content_of("talk", part.start, part.size_bytes)
    return client.commit_ingest(opened.ingest).name


def attach(client, tokens):
    """What matched, in which document; its bytes are checked."""
    attached = client.attach_prefix(FINGERPRINT, tokens)
    try:
        client.wait_layers(attached.lease, 2)
        assert [part.start for part in attached.parts] == list(range(0, attached.token_count, 32))
        for part in attached.parts:
            assert bytes(client.view(part)) == content_of("talk", part.start, part.size_bytes)
    finally:
        client.detach(attached.lease)
    return attached.token_count, attached.document


def test_a_prompt_is_attached_as_far_as_it_is_known(daemon):
    """In whole extents, within one, and where two prompts share only a front of a part-filled extent."""
    client = daemon.start().client()
    with pytest.raises(PrefixNotFound):
        attach(client, TOKENS)
    name = store(client, 100)
    assert attach(client, TOKENS[:100]) == (100, name)
    assert attach(client, TOKENS) == (96, name), "a block that is not full is found as such only"
    assert attach(client, [*TOKENS[:64], 1, 2, 3]) == (64, name)
    assert attach(client, [*TOKENS[:90], 1, 2, 3]) == (80, name)
    assert attach(client, TOKENS[:20]) == (16, name)
    with pytest.raises(PrefixNotFound):
        attach(client, TOKENS[:15])
    assert client.documents() == []
    assert client.lookup_tokens(FINGERPRINT, TOKENS).document == name
    assert client.document(name).use_count == 6, "one by its ingest"
    assert daemon.leases() == []


def test_a_name_is_found_by_tokens_too(daemon):
    client = daemon.start().client()
    put(client, "talk", 100, tokens=TOKENS[:100])
    assert attach(client, TOKENS[:100]) == (100, "talk")


def test_nobody_attaches_what_is_of_another_tenant_or_has_other_key_parts(daemon):
    client = daemon.start().client()
    other = daemon.client("other")
    store(client, 100)
    with pytest.raises(PrefixNotFound):
        attach(other, TOKENS)
    with pytest.raises(PrefixNotFound):
        client.attach_prefix(FINGERPRINT, TOKENS, extras={0: b"salt"})
    attached = client.attach_prefix(FINGERPRINT, TOKENS, extras={2: b"picture"})
    assert attached.token_count == 32
    with pytest.raises(SpecMismatch):
        client.attach_prefix(b"nobody's", TOKENS)
    with pytest.raises(TokenOutOfRange):
        client.attach_prefix(FINGERPRINT, [SPEC.vocabulary_size])


def test_what_leaves_between_a_lookup_and_an_attach_is_a_miss(daemon):
    client = daemon.start().client()
    name = store(client, 100, WritePolicy.MEMORY)
    assert client.lookup_tokens(FINGERPRINT, TOKENS).token_count == 96
    client.free(name, "none")
    with pytest.raises(PrefixNotFound):
        attach(client, TOKENS)
    with pytest.raises(DocumentNotFound):
        client.document(name)


def test_it_comes_from_nvme_and_the_receipt_says_so(daemon):
    client = daemon.start().client()
    name = store(client, 100)
    until(lambda: durable(client, name), "it is durable")
    client.free(name, "nvme")
    attached = client.attach_prefix(FINGERPRINT, TOKENS)
    receipt = client.report(attached.lease, exposed_ns=7, prefill_ns=0, decode_ns=0, answer_tokens=0)
    assert (receipt.source_tier, receipt.token_count, receipt.exposed_ns) == ("nvme", 96, 7)
    assert receipt.document == f"default/{name}"


@pytest.mark.parametrize("cold", [False, True])
def test_after_a_kill_it_is_found_where_anything_is_left_of_it(daemon, cold):
    """Durable or in memory, and at once; what only memory had is no name after a reboot."""
    client = daemon.start().client()
    lasting, fleeting = tokens_of("lasting", 64), tokens_of("fleeting", 64)
    kept = store(client, 64, tokens=lasting)
    until(lambda: durable(client, kept), "it is durable")
    lost = store(client, 64, WritePolicy.MEMORY, fleeting)
    until(lambda: daemon.metric("holdfast_unnamed_documents") == 2, "both are there")
    client.close()
    client = (daemon.restart_cold if cold else daemon.restart)().client()
    assert attach(client, [*lasting, 1]) == (64, kept)
    if cold:
        with pytest.raises(PrefixNotFound):
            attach(client, fleeting)
    else:
        assert attach(client, fleeting) == (64, lost)
    assert daemon.metric("holdfast_unnamed_documents") == 2 - cold


def test_what_has_lost_its_last_copy_does_not_come_back(daemon):
    """Whenever the daemon is killed after that; nor does what another has absorbed."""
    client = daemon.start().client()
    first = store(client, 40)
    until(lambda: durable(client, first), "it is durable")
    second = store(client, 100)
    until(lambda: durable(client, second), "it is durable")
    gone = store(client, 64, tokens=tokens_of("gone", 64))
    until(lambda: durable(client, gone), "it is durable")
    client.free(gone, "none")
    client = daemon.restart().client()
    for name in (first, gone):
        with pytest.raises(DocumentNotFound):
            client.document(name)
    assert attach(client, TOKENS) == (96, second)
    client = daemon.restart_cold().client()
    assert daemon.metric("holdfast_unnamed_documents") == 1
    assert attach(client, TOKENS) == (96, second)
