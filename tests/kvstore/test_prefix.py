"""Lookups against a naive search over what every extent is known to hold."""

import numpy as np
import pytest
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import HoldfastError, InvalidRequest, PrefixNotFound, SpecMismatch
from holdfast.kvstore.extent import cut
from holdfast.kvstore.fronts import Fronts
from holdfast.kvstore.keys import block_keys
from holdfast.kvstore.orders import ReadIn
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.spec import KVSpec, LayerGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import CLIENT, FAR_NS, tiny_service, tiny_spec
from scene import Scene, named

SPEC = tiny_spec()  # blocks of 16 tokens, extents of two blocks
FINGERPRINT = SPEC.fingerprint()
BLOCK, STEP = 16, 32
GROUPS = tuple(LayerGroup(layers=(n,), kv_heads=1, key_dim=8, value_dim=8) for n in range(2))
TWO_GROUPS = KVSpec(groups=GROUPS, dtype="float32", model="two", vocabulary_size=1000, block_tokens=16, extent_blocks=2)
MEMORY = WritePolicy.MEMORY
LENGTHS = st.sampled_from([1, 15, 16, 17, 31, 32, 33, 47, 48, 64, 80, 96, 100])
STREAMS = st.tuples(st.sampled_from([0, 5, 16, 20, 32, 40, 48, 64]), st.integers(0, 2))


def stream(same, number, length):
    """Tokens that are the same for all up to `same`, and number's own behind."""
    return tuple(i % 7 if i < same else 100 * (number + 1) + i % 5 for i in range(length))


def store(service, effects, name, tokens, tenant="default", spec=SPEC, policy=WritePolicy.THROUGH):
    """A committed document, everything settled."""
    heard = []
    ids = np.array(tokens, np.uint32)
    document = DocumentId(tenant, name)
    opened = service.begin_ingest(CLIENT, document, spec.fingerprint(), ids, policy, None, 64, FAR_NS, heard.append)
    service.commit_ingest(CLIENT, opened.id, heard.append)
    effects.complete_all(service)
    assert not [result for result in heard if isinstance(result, HoldfastError)]
    service.state.check()
    return opened.document.id


def look(service, tokens, tenant="default", spec=SPEC):
    """What a lookup of these tokens finds: their number, and how many in which tier."""
    made, secret = service.keying(tenant, spec.fingerprint())
    keys = b"".join(block_keys(np.array(tokens, np.uint32), made, secret))
    found = service.lookup(tenant, spec.fingerprint(), keys)
    assert sum(found.tiers.values()) == found.token_count
    return found.token_count, {tier: count for tier, count in found.tiers.items() if count}


def keys_of(service, tokens, tenant="default", spec=SPEC):
    """The block keys of these tokens, one after another."""
    return b"".join(block_keys(np.array(tokens, np.uint32), *service.keying(tenant, spec.fingerprint())))


def check_document(service, known, tokens, count):
    """What a lookup names holds all that it found, and an attach leases just that."""
    found = service.lookup("default", FINGERPRINT, keys_of(service, tokens))
    if not count:
        assert found.document is None
        with pytest.raises(PrefixNotFound):
            service.attach_prefix(CLIENT, "default", FINGERPRINT, keys_of(service, tokens), FAR_NS, [].append)
        return
    assert known[found.document][:count] == tokens[:count]
    heard = []
    assert (
        service.attach_prefix(CLIENT, "default", FINGERPRINT, keys_of(service, tokens), FAR_NS, heard.append) == count
    )
    lease = next(iter(service.state.leases.values()))
    records = service.attaches.open[lease.id].loading.records
    assert known[lease.document][:count] == tokens[:count]
    assert [record.extent.start for record in records] == list(range(0, count, STEP))
    service.detach(CLIENT, lease.id)
    service.state.check()


def naive(held, tokens):
    """`held`: (all tokens up to an extent's end, its first token), of every extent that has a readable copy."""
    total = 0
    while total < len(tokens):
        best = 0
        for content, start in held:
            if start != total or content[:start] != tokens[:start]:
                continue
            upto = start
            while upto < len(content):
                stop = min(upto + BLOCK, len(content))
                # A block that is not full equals only a block that ends where it ends.
                if tokens[upto : upto + BLOCK] != content[upto:stop]:
                    break
                upto = stop
            best = max(best, upto - start)
        total += best
        if best < STEP:
            break
    return total


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(STREAMS, LENGTHS, st.booleans()), min_size=1, max_size=5),
    st.lists(st.tuples(STREAMS, LENGTHS), min_size=1, max_size=8),
    st.data(),
)
def test_a_lookup_finds_what_a_naive_search_finds(documents, queries, data):
    service, effects, _ = tiny_service()
    labels, known = {}, {}
    for number, ((same, which), length, stays) in enumerate(documents):
        tokens = stream(same, which, length)
        document = store(service, effects, str(number) if data.draw(st.booleans()) else "", tokens)
        known[document] = tokens
        keys = block_keys(np.array(tokens, np.uint32), *service.keying("default", FINGERPRINT))
        for extent in cut(keys, length, SPEC, "default"):
            labels[extent.id] = (tokens[: extent.stop], extent.start)
        if not stays:
            service.evict(document, data.draw(st.sampled_from([Tier.DDR, Tier.NVME])), 0, FAR_NS, [].append)
            effects.complete_all(service)
        if document in service.state.documents and data.draw(st.booleans()):
            service.delete(document)
            effects.complete_all(service)
    extents = service.state.extents
    held = [labels[name] for name, r in extents.items() if any(copy.readable for copy in r.placements())]
    for (same, which), length in queries:
        tokens = stream(same, which, length)
        count = look(service, tokens)[0]
        assert count == naive(held, tokens)
        check_document(service, known, tokens, count)
    assert len(service.state.fronts) == sum(len(r.extent.block_keys) > 16 for r in extents.values())


def test_tokens_are_counted_in_the_tier_that_is_nearest():
    service, effects, _ = tiny_service()
    tokens = stream(0, 1, 100)
    document = store(service, effects, "a", tokens)
    assert look(service, tokens) == (100, {Tier.DDR: 100})
    service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    effects.complete_all(service)
    assert look(service, tokens) == (100, {Tier.NVME: 100})
    store(service, effects, "front", tokens[:64], policy=WritePolicy.MEMORY)
    assert look(service, tokens[:90]) == (80, {Tier.NVME: 80}), "nothing is copied by looking"


def test_the_scarcest_layer_group_counts():
    service, effects, _ = tiny_service()
    service.register_spec(TWO_GROUPS)
    tokens = stream(0, 1, 96)
    document = store(service, effects, "a", tokens, spec=TWO_GROUPS)
    assert look(service, tokens, spec=TWO_GROUPS) == (96, {Tier.DDR: 96})
    second = [service.state.extents[e] for e in service.state.documents[document].document.extents if e.endswith(":1")]
    service.store.drop(second[1].ddr)
    assert look(service, tokens, spec=TWO_GROUPS) == (96, {Tier.DDR: 64, Tier.NVME: 32})
    service.store.drop_nvme(second[1])
    assert look(service, tokens, spec=TWO_GROUPS) == (32, {Tier.DDR: 32})


def test_nobody_finds_what_is_of_another_tenant_or_model():
    """Not even with the other's keys."""
    service, effects, _ = tiny_service()
    tokens = stream(0, 1, 96)
    store(service, effects, "a", tokens, tenant="ours")
    assert look(service, tokens, "ours")[0] == 96
    assert look(service, tokens, "theirs")[0] == 0
    stolen = b"".join(block_keys(np.array(tokens, np.uint32), *service.keying("ours", FINGERPRINT)))
    assert service.lookup("ours", FINGERPRINT, stolen).token_count == 96
    assert service.lookup("theirs", FINGERPRINT, stolen).token_count == 0
    other = tiny_spec("tiny@2")
    service.register_spec(other)
    assert service.lookup("ours", other.fingerprint(), stolen).token_count == 0


def test_what_is_no_sequence_of_keys_is_refused():
    service, _, _ = tiny_service()
    assert service.lookup("default", FINGERPRINT, b"").token_count == 0
    assert service.lookup("default", FINGERPRINT, bytes(160)).token_count == 0
    with pytest.raises(InvalidRequest, match="16 bytes"):
        service.lookup("default", FINGERPRINT, bytes(17))
    with pytest.raises(SpecMismatch):
        service.lookup("default", b"nobody's", bytes(16))


def test_a_lookup_is_no_use():
    """Eviction learns nothing from it."""
    service, effects, clock = tiny_service()
    tokens = stream(0, 1, 96)
    document = store(service, effects, "a", tokens)
    record = service.state.extents[service.state.documents[document].document.extents[0]]
    clock.advance(1000)
    before = service.planner.explain(record, record.ddr)
    look(service, tokens)
    assert service.planner.explain(record, record.ddr) == before
    assert service.state.documents[document].use_count == 1


def test_fronts_forget_what_is_gone():
    """However many extents began with one block."""
    fronts = Fronts()
    tokens = [np.array(stream(16, number, 32), np.uint32) for number in range(3)]
    extents = [cut(block_keys(ids, SPEC, bytes(32)), 32, SPEC, "t")[0] for ids in tokens]
    front = extents[0].block_keys[:16]
    for extent in [*extents, *extents]:
        fronts.add(extent)
    assert list(fronts.of(front)) == [extent.id for extent in reversed(extents)]
    for extent in [*extents, *extents]:
        fronts.discard(extent)
    assert list(fronts.of(front)) == []
    assert len(fronts) == 0


def test_an_attach_takes_what_is_on_its_way_but_not_what_only_a_group_has():
    scene = Scene()
    scene.group()
    ids = list(stream(0, 1, 64))
    document = scene.store("", ids, WritePolicy.MEMORY, group="g")
    keys = keys_of(scene.service, ids, "t")
    for extent in reversed(scene.state.documents[document].document.extents):
        scene.service.store.drop(scene.state.extents[extent].ddr)
    assert scene.service.lookup("t", FINGERPRINT, keys).tiers[Tier.HBM] == 64
    with pytest.raises(PrefixNotFound):
        scene.service.attach_prefix(CLIENT, "t", FINGERPRINT, keys, FAR_NS, [].append)
    scene = Scene()
    scene.evict(scene.store("", ids), Tier.DDR)
    heard = []
    for _ in range(2):  # the second while the first still waits for its bytes
        assert scene.service.attach_prefix(CLIENT, "t", FINGERPRINT, keys, FAR_NS, heard.append) == 64
    assert len(scene.pending(ReadIn)) == 2
    scene.settle()
    assert [attach.loading.layers for attach in heard] == [2, 2]


def test_what_has_expired_or_grown_is_not_attached():
    """A document that grew is, as what it is now."""
    scene = Scene()
    ids = list(stream(0, 1, 100))
    scene.store("a", ids[:50])
    scene.store("a", ids)
    keys = keys_of(scene.service, ids, "t")
    assert scene.service.lookup("t", FINGERPRINT, keys).document == named("a")
    scene.clock.advance(1)
    scene.service.expiry.set(named("a"), 1e-9)
    scene.clock.advance(2)
    found = scene.service.lookup("t", FINGERPRINT, keys)
    assert (found.token_count, found.document) == (0, None)
    with pytest.raises(PrefixNotFound):
        scene.service.attach_prefix(CLIENT, "t", FINGERPRINT, keys, FAR_NS, [].append)


def test_what_only_its_readers_still_hold_is_not_found():
    """The version before of a document that grew, or one that an operator has let go."""
    scene = Scene()
    ids = list(stream(0, 1, 64))
    (attach,) = scene.attach(scene.store("a", ids[:31], MEMORY))
    scene.store("a", ids, MEMORY)
    assert scene.state.extents[attach.owner.extents[-1]].ddr.holds
    for count, found in ((31, 16), (32, 32), (64, 64)):
        keys = keys_of(scene.service, ids[:count], "t")
        assert scene.service.lookup("t", FINGERPRINT, keys).token_count == found


def test_of_several_layer_groups_one_document_has_all():
    """Two that leave each other within an extent, each of which has lost it in another group."""
    service, effects, _ = tiny_service()
    service.register_spec(TWO_GROUPS)
    tokens = stream(16, 1, 32)
    for number, group in enumerate("01"):
        document = store(service, effects, str(number), stream(16, 2 + number, 32), spec=TWO_GROUPS, policy=MEMORY)
        (lost,) = (e for e in service.state.documents[document].document.extents if e.endswith(f":{group}"))
        assert look(service, tokens, spec=TWO_GROUPS)[0] == 16
        service.store.drop(service.state.extents[lost].ddr)
        assert look(service, tokens, spec=TWO_GROUPS)[0] == 0
