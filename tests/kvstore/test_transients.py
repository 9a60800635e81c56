"""Documents that nobody has named: what they take the place of, and when they are forgotten."""

import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import CorruptExtent, InvalidName, NoCapacity
from holdfast.kvstore.keys import as_tokens, block_keys
from holdfast.kvstore.orders import DropDocument, ReadIn, Write
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import Service

from fakes import CLIENT, EXTENT_BYTES, FAR_NS, ManualEffects, tiny_spec
from scene import FINGERPRINT, SPEC, Scene, secret, tokens

MEMORY = WritePolicy.MEMORY


def unnamed(scene):
    """The unnamed documents that are there."""
    return set(scene.state.documents.unnamed)


def look(scene, ids):
    """How many leading tokens are in the cache."""
    keys = b"".join(block_keys(ids_of(ids), SPEC, secret("t")))
    return scene.service.lookup("t", FINGERPRINT, keys).token_count


def ids_of(ids):
    """As an array."""
    return as_tokens(ids, SPEC)


def drops(scene):
    """Documents that the catalog is told to forget."""
    orders = [order for order in scene.effects.orders if isinstance(order, Write)]
    return [record.name for order in orders for record in order.records if isinstance(record, DropDocument)]


def other(ids, at):
    """The same up to a token, then others."""
    return [*ids[:at], *((token + 1) % 1000 for token in ids[at:])]


def test_what_has_no_name_is_named_by_its_last_key_and_found_by_its_tokens():
    scene = Scene()
    ids = tokens(1, 2)[:50]
    document = scene.store("", ids)
    assert document.namespace == "prompt"
    assert document.name == f"prompt/{block_keys(ids_of(ids), SPEC, secret('t'))[-1].hex()}"
    assert look(scene, ids) == 50
    assert list(scene.state.documents.named) == []
    assert scene.store("", ids) == document, "storing it again is no other one"
    with pytest.raises(InvalidName):
        scene.service.begin_ingest(
            CLIENT, DocumentId("t", "prompt/x"), FINGERPRINT, ids_of(ids), MEMORY, None, 64, FAR_NS, [].append
        )


def test_a_conversation_of_many_turns_leaves_one_document():
    """Whether turns end with a block, in the middle of one, or with an extent; and what only they had is free."""
    scene = Scene(ddr=16, nvme=16)
    ids = tokens(1, 4)
    for count in (16, 20, 32, 45, 64, 100, 128):
        last = scene.store("", ids[:count])
        assert unnamed(scene) == {last}
        assert scene.state.used_bytes()["ddr"] == -(-count // 32) * EXTENT_BYTES
        assert scene.state.used_bytes()["nvme"] == -(-count // 32) * EXTENT_BYTES
    assert len(scene.state.prompts) == 1


def test_another_conversation_is_not_taken_for_an_earlier_turn():
    """Neither where the full extents are the same, nor all full blocks, nor where extra key parts differ."""
    ids = tokens(1, 4)
    for shorter, extras in (
        (other(ids, 40)[:50], {}),
        (other(ids, 49)[:50], {}),
        (ids[:50], {0: b"salt"}),
        (ids[:50], {3: b"picture"}),
        (ids[:15], {}),  # shorter than a block: not looked for
    ):
        scene = Scene()
        first = scene.store("", shorter, extras=extras)
        second = scene.store("", ids[:100])
        assert unnamed(scene) == {first, second}
    scene = Scene()
    scene.store("", ids[:50], extras={3: b"picture"})
    second = scene.store("", ids[:100], extras={3: b"picture", 5: b"more"})
    assert unnamed(scene) == {second}


def test_a_document_with_a_name_neither_absorbs_nor_is_absorbed():
    scene = Scene(ddr=16, nvme=16)
    ids = tokens(1, 4)
    first = scene.store("", ids[:40])
    named = scene.store("a", ids[:60])
    scene.store("b", ids[:100])
    assert unnamed(scene) == {first}
    last = scene.store("", ids[:120])
    assert unnamed(scene) == {last}
    assert named in scene.state.documents


def test_what_is_in_use_is_absorbed_when_that_ends():
    """A lease's bytes stay until then; a pin keeps it for good."""
    ids = tokens(1, 4)
    scene = Scene()
    first = scene.store("", ids[:50])
    (attach,) = scene.attach(first)
    second = scene.store("", ids[:100])
    assert unnamed(scene) == {first, second}
    scene.detach(attach)
    scene.service.tick()
    assert unnamed(scene) == {second}
    scene.service.pin(second, Tier.DDR, None, "me", "", PinKind.SOFT)
    third = scene.store("", ids[:128])
    scene.service.tick()
    assert unnamed(scene) == {second, third}


def test_it_is_forgotten_with_its_last_copy():
    """Out of DDR where it never was on NVMe, and then the catalog needs not be told; else out of NVMe."""
    scene = Scene()
    ids = tokens(1, 2)
    document = scene.store("", ids, MEMORY)
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    assert not drops(scene)
    scene.settle()
    assert not scene.state.documents
    assert not scene.state.extents
    document = scene.store("", ids)
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    scene.settle()
    assert document in scene.state.documents
    scene.service.evict(document, Tier.NVME, 0, FAR_NS, [].append)
    assert drops(scene) == [document.name]
    scene.settle()
    assert not scene.state.documents
    assert not scene.state.prompts


def test_it_stays_while_anything_is_left_that_only_it_needs():
    """A front that others need too does not keep it; the last that needs it does."""
    scene = Scene(ddr=6, nvme=6)
    ids = tokens(1, 3)
    first, second = scene.store("", ids, MEMORY), scene.store("", other(ids, 64), MEMORY)
    tails = [scene.state.documents[document].document.extents[-1] for document in (first, second)]
    scene.store("", tokens(2, 1), MEMORY)
    filler = scene.store("", tokens(3, 1), MEMORY)
    for document in (filler,):
        scene.attach(document)
    gone = []
    for tail, document in zip(tails, (first, second), strict=True):
        victim = scene.service.planner.last_copy(scene.state.extents[tail], scene.state.extents[tail].ddr)
        scene.service.room.execute([victim], "pressure")
        scene.service.tick()
        gone.append(document in scene.state.documents)
    assert gone == [False, True], "the second has the front for itself by now"
    assert look(scene, ids) == 64


def test_what_turns_out_to_be_corrupt_takes_its_document_along():
    """When its readers have heard of it."""
    scene = Scene()
    ids = tokens(1, 1)
    document = scene.store("", ids)
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    scene.settle()
    (attach,) = scene.attach(document)
    scene.end(scene.pending(ReadIn)[0], CorruptExtent("planted"))
    scene.settle()
    assert document in scene.state.documents, "it is leased"
    scene.detach(attach)
    scene.service.tick()
    assert not scene.state.documents


def test_a_restart_brings_back_those_of_which_something_is_left():
    """The catalog forgets the others."""
    scene = Scene()
    kept, lost = scene.store("", tokens(1, 1)), scene.store("", tokens(2, 1))
    named = scene.store("a", tokens(3, 1))
    documents = [scene.state.documents[document].document for document in (kept, lost, named)]
    extents = [
        (scene.state.extents[d.extents[0]].extent, scene.state.extents[d.extents[0]].nvme.slot) for d in documents
    ]
    effects = ManualEffects()
    service = Service(scene.config, scene.clock, effects, secret)
    service.restore([tiny_spec()], extents[:1], documents, [])
    assert set(service.state.documents) == {kept, named}
    records = [record for order in effects.orders for record in order.records]
    assert [record.name for record in records if isinstance(record, DropDocument)] == [lost.name]


def test_there_are_only_so_many_of_them():
    """Beside those that have names; the same one again is no other one."""
    scene = Scene(unnamed=2, documents=1)
    scene.store("a", tokens(5, 1))
    scene.store("", tokens(1, 1))
    scene.store("", tokens(2, 1))
    with pytest.raises(NoCapacity, match=r"limits\.unnamed"):
        scene.begin("", tokens(3, 1))
    with pytest.raises(NoCapacity, match=r"limits\.documents"):
        scene.begin("b", tokens(3, 1))
    scene.store("", tokens(2, 1))
