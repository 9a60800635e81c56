"""Documents that grow under their names, and attaches that come before their documents: scenes."""

import pytest
from holdfast.kvstore.awaiting import Waiter
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import (
    DeadlineExceeded,
    DocumentExists,
    DocumentNotFound,
    InUse,
    LayoutError,
    NoCapacity,
    PinsOvercommitted,
    SpecMismatch,
)
from holdfast.kvstore.layout import chunked, contiguous, striped
from holdfast.kvstore.orders import LoadShard, OpenShard, PutDocument, SaveShard, Write, WriteOut
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.state import Left, ShardKey

from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import FINGERPRINT, SPEC, Scene, rows, tokens

A = DocumentId("t", "a")
LONG = tokens(1, 3)[:90]  # three extents, the last part-filled
SHORT = LONG[:50]  # two, the last part-filled


def version(scene, document=A):
    """Tokens of the version that is published."""
    return scene.state.documents[document].document.token_count


# A longer version under the same name ------------------------------------------------------------


def test_a_document_grows_and_shares_what_is_full():
    """The last, part-filled extent is replaced; nothing is left of it."""
    scene = Scene()
    scene.store("a", SHORT)
    first, last = scene.state.documents[A].document.extents
    grown, _ = scene.begin("a", LONG)
    assert grown.cached_tokens == 32
    assert [extent.start for extent in grown.missing] == [32, 64]
    assert version(scene) == 50, "the version before is there until the commit"
    scene.commit(grown)
    scene.settle()
    assert version(scene) == 90
    assert first in scene.state.extents
    assert last not in scene.state.extents
    assert scene.state.used_bytes()["ddr"] == scene.state.used_bytes()["nvme"] == 3 * EXTENT_BYTES
    scene.service.delete(A)
    scene.settle()
    assert scene.empty()


@pytest.mark.parametrize("ids", [[9, *LONG[1:]], LONG[:49] + [9] * 10, LONG[:33]])
def test_what_does_not_continue_a_document_is_refused(ids):
    scene = Scene()
    scene.store("a", SHORT)
    with pytest.raises(DocumentExists):
        scene.begin("a", ids)
    assert version(scene) == 50


def test_a_document_with_extra_key_parts_grows_only_with_the_same_ones():
    """Also where the part belongs to the block that was part-filled."""
    for block in (0, 3):
        scene = Scene()
        scene.store("a", SHORT, extras={block: b"picture"})
        for extras in ({}, {block: b"another"}):
            with pytest.raises(DocumentExists):
                scene.begin("a", LONG, extras=extras)
        scene.store("a", LONG, extras={block: b"picture", 5: b"more"})
        assert version(scene) == 90


def test_a_growth_that_is_aborted_leaves_the_document_as_it_was():
    scene = Scene()
    scene.store("a", SHORT)
    before = scene.state.documents[A]
    grown, _ = scene.begin("a", LONG)
    with pytest.raises(InUse):
        scene.begin("a", LONG)
    scene.service.abort_ingest(CLIENT, grown.id)
    scene.settle()
    assert scene.state.documents[A] is before
    assert scene.state.used_bytes()["ddr"] == 2 * EXTENT_BYTES


def test_whoever_reads_the_version_before_goes_on():
    """In DDR its bytes stay until it has detached, and then they go."""
    scene = Scene()
    scene.store("a", SHORT)
    last = scene.state.documents[A].document.extents[-1]
    (attach,) = scene.attach(A)
    slot = scene.state.extents[last].ddr.slot
    scene.store("a", LONG)
    assert attach.owner.token_count == 50
    assert scene.state.extents[last].ddr.slot == slot
    with pytest.raises(InUse):
        scene.service.delete(A)
    scene.detach(attach)
    scene.settle()
    assert last not in scene.state.extents
    assert scene.state.used_bytes()["ddr"] == 3 * EXTENT_BYTES


def test_a_group_holds_both_versions_while_the_one_before_is_read():
    """The layout is the one that was asked for; the front is loaded; then the old rows are free."""
    scene = Scene()
    scene.group(rows=100)
    scene.store("a", SHORT, group="g")
    (attach,) = scene.attach(A, "g")
    layout = chunked(attach.loading.shard.layout.then(striped(40, 2)), 90, 64)
    heard = []
    grown = scene.service.begin_ingest(
        CLIENT, A, FINGERPRINT, LONG, WritePolicy.AUTO, "g", 64, FAR_NS, heard.append, layout=layout
    )
    (load,) = scene.pending(LoadShard)
    assert [(part.start, part.valid_tokens) for part in load.parts] == [(0, 32)]
    assert grown.shard.layout == layout
    assert set(scene.state.groups["g"].shards) == {ShardKey(A, 50), ShardKey(A, 90)}
    scene.settle()
    scene.commit(grown)
    (save,) = scene.pending(SaveShard)
    assert [(part.start, part.valid_tokens) for part in save.parts] == [(32, 32), (64, 26)]
    scene.settle()
    assert version(scene) == 90
    assert set(scene.state.groups["g"].shards) == {ShardKey(A, 50), ShardKey(A, 90)}, "it is still read"
    longest = tokens(1, 4)[:100]
    scene.store("a", longest)
    assert set(scene.state.groups["g"].shards) == {ShardKey(A, 50)}, "the one between is read by nobody"
    scene.detach(attach)
    assert not scene.state.groups["g"].shards
    scene.store("a", [*longest, 1], group="g")
    (again,) = scene.attach(A, "g")
    assert again.loading.swap.source_bytes == {"hbm": 4 * EXTENT_BYTES}
    scene.detach(again)


def test_a_shard_of_the_version_before_that_nobody_reads_goes_with_it():
    """Also in another group than the one that made the longer one, and one of a group that has gone."""
    scene = Scene()
    scene.group()
    for rank, client in enumerate((31, 32)):
        scene.service.register_rank(client, "h", rank, 2, 1, FINGERPRINT, 160)
    scene.store("a", SHORT, group="g")
    (attach,) = scene.attach(A, "h")
    scene.settle()
    scene.store("a", LONG)
    assert not scene.state.groups["g"].shards
    assert set(scene.state.groups["h"].shards) == {ShardKey(A, 50)}
    scene.service.disconnect(31)
    scene.state.check()
    assert not scene.state.retired
    scene.detach(attach)


def test_an_attach_that_waits_while_its_document_grows_leaves_no_rows_behind():
    scene = Scene(ddr=8, nvme=32)
    scene.group()
    scene.store("a", SHORT)
    scene.evict(A, Tier.DDR)
    ingest, _ = scene.begin("a", LONG)
    scene.settle()
    scene.store("b", tokens(5, 8 - len(ingest.missing)), WritePolicy.BACK)
    heard = scene.attach(A, "g")
    assert not heard, "it waits for room"
    scene.commit(ingest)
    while others := [order for order in scene.effects.orders if not isinstance(order, WriteOut)]:
        scene.end(others[0])
    assert version(scene) == 90
    assert not heard
    scene.settle()
    assert heard[0].owner.token_count == 50
    scene.detach(heard[0])
    scene.settle()
    assert not scene.state.groups["g"].shards


def test_a_group_without_room_for_both_says_so_at_once():
    """Detached, the version before makes room: what remains of it in DDR is loaded, the rest prefilled."""
    scene = Scene()
    scene.group(rows=60)
    scene.store("a", SHORT, group="g")
    (attach,) = scene.attach(A, "g")
    layout = chunked(attach.loading.shard.layout, 90, 64)
    heard = []
    scene.service.begin_ingest(
        CLIENT, A, FINGERPRINT, LONG, WritePolicy.AUTO, "g", 64, FAR_NS, heard.append, layout=layout
    )
    scene.settle()
    assert [type(error) for error in heard] == [NoCapacity]
    scene.detach(attach)
    scene.store("a", LONG, group="g")
    assert version(scene) == 90


@pytest.mark.parametrize("layout", [contiguous(80, 2), contiguous(90, 3)])
def test_a_layout_of_other_tokens_or_ranks_is_refused(layout):
    scene = Scene()
    scene.group()
    with pytest.raises(LayoutError):
        scene.service.begin_ingest(
            CLIENT, A, FINGERPRINT, LONG, WritePolicy.AUTO, "g", 64, FAR_NS, [].append, layout=layout
        )


def test_the_write_policy_that_its_owner_named_stays():
    scene = Scene()
    scene.store("a", SHORT, WritePolicy.MEMORY)
    scene.store("a", LONG, WritePolicy.AUTO)
    assert scene.state.documents[A].document.write_policy is WritePolicy.MEMORY
    assert not scene.state.used_bytes()["nvme"]


def test_a_pin_grows_with_its_document_within_the_budget():
    scene = Scene(pin_bytes=str(3 * EXTENT_BYTES))
    scene.store("a", SHORT)
    scene.service.pin(A, Tier.DDR, None, "me", "")
    scene.settle()
    scene.store("a", LONG)
    assert scene.state.pins.get(A).size_bytes == 3 * EXTENT_BYTES
    with pytest.raises(PinsOvercommitted):
        scene.begin("a", tokens(1, 4))
    assert version(scene) == 90


# Durability --------------------------------------------------------------------------------------


def crashed(scene):
    """What the next daemon finds on disk, if it finds nothing in memory."""
    other = Scene()
    extents = {r.extent.id: r for r in scene.state.extents.values() if r.cataloged}
    other.service.restore([SPEC], [(r.extent, r.nvme.slot) for r in extents.values()], scene.catalog, ())
    other.settle()
    return other


class Cataloged(Scene):
    """Remembers which documents the catalog has."""

    def __init__(self):
        super().__init__()
        self._rows = {}

    @property
    def catalog(self):
        return list(self._rows.values())

    def end(self, order, error=None):
        if isinstance(order, Write) and error is None:
            for record in order.records:
                if isinstance(record, PutDocument):
                    self._rows[record.document.id] = record.document
        super().end(order, error)


def test_a_crash_before_the_longer_version_is_durable_leaves_the_durable_one_whole():
    """At every step; and afterwards nothing of it is left."""
    scene = Cataloged()
    scene.store("a", SHORT)
    ingest, _ = scene.begin("a", LONG)
    scene.commit(ingest)
    lengths = []
    while scene.effects.orders:
        scene.end(scene.effects.orders[0])
        after = crashed(scene)
        lengths.append(version(after))
        assert all(after.tiers(A)), "a hole in what was durable"
    assert lengths == sorted(lengths)
    assert lengths[-1] == 90
    assert len(scene.state.extents) == 3


def test_growing_twice_before_the_disk_follows_keeps_the_durable_version():
    scene = Cataloged()
    scene.store("a", SHORT)
    for count in (70, 90, 120):
        ingest, _ = scene.begin("a", tokens(1, 4)[:count])
        scene.commit(ingest)
        while quick := [order for order in scene.effects.orders if not isinstance(order, WriteOut)]:
            scene.end(quick[0])
        after = crashed(scene)
        assert version(after) == 50
        assert all(after.tiers(A))
    assert version(scene) == 120
    scene.settle()
    assert len(scene.state.extents) == 4
    assert version(crashed(scene)) == 120


def test_a_version_that_is_never_durable_leaves_the_durable_one_on_disk_until_it_is_deleted():
    scene = Cataloged()
    scene.store("a", SHORT)
    scene.store("a", LONG, WritePolicy.MEMORY)
    assert version(scene) == 90
    after = crashed(scene)
    assert version(after) == 50
    assert all(after.tiers(A))
    scene.service.delete(A)
    scene.settle()
    assert scene.empty()


@pytest.mark.parametrize("whole", [True, False])
def test_a_warm_restart_finds_the_longer_version_if_it_is_whole(whole):
    """Else the durable one, which is. The next crash still finds one of them on disk."""
    scene = Scene()
    scene.store("a", SHORT)
    on_disk = rows(scene)
    scene.store("a", LONG, WritePolicy.MEMORY)
    here = [(r.extent, r.ddr.slot) for r in scene.state.extents.values() if r.ddr is not None]
    left = Left(
        specs=[SPEC],
        extents=here if whole else [item for item in here if item[0].start < 64],
        documents=[scene.state.documents[A].document],
        slabs=range(4),
    )
    after = Cataloged()
    after._rows = {A: on_disk[2][0]}
    after.service.restore(*on_disk, left=left)
    after.settle()
    after.state.check()
    assert version(after) == (90 if whole else 50)
    assert all(after.tiers(A))
    again = crashed(after)
    assert version(again) == 50
    assert all(again.tiers(A))


# Attaches that come first --------------------------------------------------------------------------


def waits(scene, name="a", group=None, client=CLIENT, until_ns=FAR_NS, document=None):
    """Returns what is heard."""
    heard = []
    document = DocumentId("t", name)

    def attach():
        scene.service.attach(client, document, FINGERPRINT, group, None, FAR_NS, heard.append)

    waiter = Waiter(client=client, document=document, deadline_ns=until_ns, attach=attach, refused=heard.append)
    scene.service.when_published(waiter)
    scene.state.check()
    return heard


def test_an_attach_that_came_first_is_granted_when_the_document_is_published():
    """To a group and to DDR; one whose document is there already does not wait."""
    scene = Scene()
    scene.group()
    heard, other = waits(scene, group="g", client=8), waits(scene, client=9)
    ingest, _ = scene.begin("a", SHORT)
    scene.settle()
    assert heard == other == []
    scene.commit(ingest)
    scene.settle()
    assert [attach.loading.phase for attach in (*heard, *other)] == ["ready", "ready"]
    assert waits(scene)[0].loading.phase == "ready"
    assert not scene.service.awaiting.waiters


def test_a_group_that_waited_has_its_first_layer_before_the_last_has_come():
    """Loaded from NVMe layer by layer, as any attach."""
    scene = Scene(ddr=4)
    scene.group()
    ingest, _ = scene.begin("a", LONG, WritePolicy.THROUGH)
    heard = waits(scene, group="g")
    scene.commit(ingest)
    while not heard:
        scene.end(scene.effects.orders[0])
    opened = scene.pending(OpenShard)
    assert len(opened) == 1, "the ranks know their rows as soon as it is granted"
    assert heard[0].loading.phase == "moving"


@pytest.mark.parametrize("how", ["abort", "gone"])
def test_the_end_of_the_ingest_that_it_waits_for_ends_the_wait(how):
    scene = Scene()
    heard = waits(scene, client=8)
    ingest, _ = scene.begin("a", SHORT)
    if how == "abort":
        scene.service.abort_ingest(CLIENT, ingest.id)
    else:
        scene.service.disconnect(CLIENT)
    scene.settle()
    assert [type(error) for error in heard] == [DocumentNotFound]
    assert not scene.service.awaiting.waiters


def test_a_wait_ends_at_its_deadline_and_with_its_client():
    scene = Scene()
    late, gone = waits(scene, until_ns=scene.clock.monotonic_ns() + 50), waits(scene, client=8)
    scene.clock.advance(49)
    scene.service.tick()
    assert late == []
    scene.clock.advance(1)
    scene.service.tick()
    assert [type(error) for error in late] == [DeadlineExceeded]
    scene.service.disconnect(8)
    scene.store("a", SHORT)
    assert gone == []
    assert not scene.service.awaiting.waiters
    assert not scene.state.leases


def test_what_refuses_the_attach_in_the_end_is_heard():
    scene = Scene()
    heard = []
    waiter = Waiter(
        client=CLIENT,
        document=A,
        deadline_ns=FAR_NS,
        attach=lambda: scene.service.attach(CLIENT, A, bytes(16), None, None, FAR_NS, heard.append),
        refused=heard.append,
    )
    scene.service.when_published(waiter)
    scene.store("a", SHORT)
    assert [type(error) for error in heard] == [SpecMismatch]


def test_only_so_many_may_wait():
    scene = Scene(pending_reservations="2")
    waits(scene, "a")
    waits(scene, "b")
    with pytest.raises(NoCapacity, match="pending_reservations"):
        waits(scene, "c")
