"""Hints in a service: what is brought near, for whom room is made, how hints end, and what is learnt from that."""

import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DocumentNotFound, GroupNotFound, InvalidRequest, NoCapacity, StorageFailed
from holdfast.kvstore.hints import BELIEF, HINTS_MAX, OWNER_MAX, HintState
from holdfast.kvstore.orders import LoadShard, ReadIn, Urgency
from holdfast.kvstore.precedence import EXPECTED
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.upcoming import OVERTAKEN_MAX

from fakes import CLIENT
from scene import RANKS, Scene, tokens

SECOND = 10**9


class Stage(Scene):
    """A scene with hints; documents of two extents lie on NVMe only, unless they are told to be near."""

    def __init__(self, names="abc", near="", **sizes):
        super().__init__(**{"nvme": 64} | sizes)
        self.documents = {}
        for number, name in enumerate(names):
            self.documents[name] = self.store(name, tokens(number, 2))
            self.evict(self.documents[name], Tier.DDR)
        for name in near:
            self.use(name)

    def hint(self, name, *, group=None, queries=1, seconds=None, owner="", client=CLIENT):
        hint = self.service.prefetching.hint(client, self.documents[name], group, queries, seconds, owner)
        self.state.check()
        return hint

    def pass_seconds(self, seconds):
        self.clock.advance(int(seconds * SECOND))
        self.service.tick()
        self.state.check()

    def near(self):
        """Names of documents that are all in DDR."""
        return {name for name, found in self.documents.items() if all(Tier.DDR in t for t in self.tiers(found))}

    def extents(self, name):
        """Ids of its extents."""
        return self.state.documents[self.documents[name]].document.extents

    @property
    def counts(self):
        return self.state.ledger.counts

    def use(self, name, group=None):
        """Attach, let it end well, detach; a second later than what was used before."""
        self.clock.advance(SECOND)
        heard = self.attach(self.documents[name], group)
        self.settle()
        self.detach(heard[0])
        return heard[0]


def test_a_hint_brings_its_document_near_before_anybody_asks():
    stage = Stage()
    hint = stage.hint("a", queries=3)
    reads = stage.pending(ReadIn)
    assert [order.urgency for order in reads] == [Urgency.PREFETCH] * 2
    assert hint.state is HintState.MOVING
    stage.settle()
    assert hint.state is HintState.PROMOTED
    assert stage.near() == {"a"}
    attach = stage.use("a")
    assert attach.loading.swap.moved_bytes == 0
    assert hint.state is HintState.USED
    assert (stage.counts["hints_in_time"], stage.counts["hints_used"], stage.counts["prefetched_unused"]) == (1, 1, 0)
    assert stage.counts["reattaches"] == 1


def test_one_at_a_time_the_most_queries_for_each_second_first():
    stage = Stage()
    first = stage.hint("a")
    stage.hint("b")
    stage.hint("c", queries=2)
    assert {order.extent for order in stage.pending(ReadIn)} == set(stage.extents("a"))
    while first.state is HintState.MOVING:
        stage.end(stage.effects.orders[0])
    assert {order.extent for order in stage.pending(ReadIn)} == set(stage.extents("c"))
    stage.settle()
    assert stage.near() == {"a", "b", "c"}


def test_what_is_near_already_moves_nothing():
    stage = Stage(near="a")
    hint = stage.hint("a")
    assert hint.state is HintState.PROMOTED
    stage.pass_seconds(601)
    assert hint.state is HintState.EXPIRED
    assert stage.counts["prefetched_unused"] == 0


def test_hints_wait_behind_whoever_waits_for_room():
    stage = Stage("ac", ddr=4)
    stage.store("w", tokens(9, 4), WritePolicy.BACK)
    waiting = stage.attach(stage.documents["c"])  # for what has to be written out first
    assert not waiting
    hint = stage.hint("a", owner="x")
    assert hint.state is HintState.WAITING
    while not waiting:
        assert hint.state is HintState.WAITING
        stage.end(stage.effects.orders[0])
    stage.settle()
    assert hint.state is HintState.PROMOTED


def test_a_hint_takes_the_place_of_what_the_policy_thinks_least_of():
    stage = Stage("abcde", near="abcd")
    assert stage.near() == {"a", "b", "c", "d"}
    hint = stage.hint("e")
    stage.settle()
    assert hint.state is HintState.PROMOTED
    assert stage.near() == {"b", "c", "d", "e"}
    assert hint.displaced == {"ddr": stage.state.extents[stage.extents("a")[0]].extent.slot_bytes * 2}


def test_hints_displace_no_more_than_their_share_of_a_tier():
    """Half of DDR: two documents of four. The third waits until one of them was used."""
    stage = Stage("abcdefg", near="abcd")
    hints = [stage.hint(name) for name in "efg"]
    stage.settle()
    assert [hint.state for hint in hints] == [HintState.PROMOTED, HintState.PROMOTED, HintState.WAITING]
    assert stage.near() == {"c", "d", "e", "f"}
    stage.use("e")
    stage.settle()
    assert hints[2].state is HintState.PROMOTED
    assert "f" in stage.near()


def test_what_is_leased_or_pinned_stays_and_the_hint_waits():
    stage = Stage("abc", near="ab", ddr=4)
    (attach,) = stage.attach(stage.documents["a"])
    stage.service.pin(stage.documents["b"], Tier.DDR, None, "me", "")
    stage.settle()
    hint = stage.hint("c")
    assert hint.state is HintState.WAITING
    assert not any(stage.state.extents[extent].nvme.holds for extent in stage.extents("c"))
    stage.detach(attach)
    stage.settle()
    assert hint.state is HintState.PROMOTED
    assert stage.near() == {"b", "c"}


def test_a_hint_does_not_displace_what_another_has_announced():
    """Not even where everything else is in use."""
    stage = Stage("abcde", near="abcd")
    first = stage.hint("a")
    for name in "bcd":
        stage.attach(stage.documents[name])
    second = stage.hint("e")
    stage.settle()
    assert (first.state, second.state) == (HintState.PROMOTED, HintState.WAITING)
    stage.use("a")
    stage.settle()
    assert second.state is HintState.PROMOTED


def test_what_is_pinned_softly_is_not_displaced_by_a_hint():
    stage = Stage("abc", near="ab", ddr=4)
    for name in "ab":
        stage.service.keeping.pin(stage.documents[name], Tier.DDR, 60.0, "me", "", PinKind.SOFT)
    hint = stage.hint("c")
    stage.settle()
    assert hint.state is HintState.WAITING
    stage.service.keeping.unpin(stage.documents["a"])
    stage.pass_seconds(1)
    stage.settle()
    assert stage.near() == {"b", "c"}


def test_the_shard_of_a_query_that_waits_leaves_last():
    """It waits behind another, and holds nothing in HBM before its turn."""
    stage = Stage("abcd", ddr=4)
    stage.group()
    stage.use("a", "g")
    (shard,) = stage.state.shards()

    def ranks():
        precedence = stage.service.planner.precedence
        return {precedence.rank_of(stage.state.extents[e], copy) for e, copy in shard.copies.items()}

    for name in "bc":
        (attach,) = stage.attach(stage.documents[name])
        stage.detach(attach)  # what moves stays until it has arrived
    assert ranks() == {0}
    heard = [stage.attach(stage.documents["d"]), stage.attach(stage.documents["a"], "g")]
    assert heard == [[], []]
    assert ranks() == {EXPECTED}
    stage.settle()
    assert [len(answers) for answers in heard] == [1, 1]
    assert ranks() == {0}


def test_a_hint_never_displaces_what_would_have_to_be_computed_again():
    """What lies in memory only is worth more than a load."""
    stage = Stage("a", ddr=4)
    for number in (7, 8):
        stage.store(f"m{number}", tokens(number, 2), WritePolicy.MEMORY)
    hint = stage.hint("a")
    stage.settle()
    assert hint.state is HintState.WAITING
    assert not stage.near()


def test_a_document_that_was_brought_for_nothing_is_believed_less():
    """Its owner's next hints on it take free room only, and come after others; one that is used restores the belief."""
    stage = Stage("abcde", near="abcd")
    hint = stage.hint("e", seconds=5, owner="x")
    stage.settle()
    stage.pass_seconds(6)
    assert hint.state is HintState.EXPIRED
    assert stage.counts["prefetched_unused"] == 1
    stage.evict(stage.documents["e"], Tier.DDR)
    stage.use("a")  # takes the room again
    again = stage.hint("e", owner="x")
    assert stage.service.prefetching.hints.belief(again) == BELIEF / 2
    assert again.state is HintState.WAITING
    assert stage.service.prefetching.hints.belief(stage.hint("e", owner="y")) == BELIEF
    stage.settle()
    assert again.state is HintState.PROMOTED  # another owner is believed
    stage.use("e")
    assert stage.service.prefetching.hints.belief(again) == BELIEF


def test_an_owner_is_refused_what_is_too_much_and_loses_nothing():
    stage = Stage("a")
    stage.documents |= {f"d{n}": stage.store(f"d{n}", tokens(n + 50, 1)) for n in range(OWNER_MAX)}
    for n in range(OWNER_MAX):
        stage.hint(f"d{n}")
    with pytest.raises(NoCapacity, match="used, cancelled or expired"):
        stage.hint("a")
    assert len(stage.service.prefetching.hints.live) == OWNER_MAX
    for owner in range(HINTS_MAX // OWNER_MAX - 1):
        for n in range(OWNER_MAX):
            stage.hint(f"d{n}", owner=str(owner))
    with pytest.raises(NoCapacity, match=str(HINTS_MAX)):
        stage.hint("a", owner="one more")
    assert stage.counts["hints_refused"] == 2


def test_a_second_hint_of_one_owner_brings_the_first_up_to_date():
    stage = Stage()
    first = stage.hint("a", queries=1)
    assert stage.hint("a", queries=4, seconds=9) is first
    assert (first.queries, len(stage.service.prefetching.hints.live)) == (4, 1)
    assert stage.hint("a", owner="other") is not first


def test_hints_end_with_their_client_their_document_and_their_owner_s_word():
    stage = Stage()
    hints = {name: stage.hint(name, client=client) for name, client in (("a", 90), ("b", CLIENT), ("c", CLIENT))}
    stage.settle()
    stage.service.disconnect(90)
    stage.service.delete(stage.documents.pop("b"))
    stage.service.prefetching.cancel(CLIENT, stage.documents["c"], None, "")
    stage.service.prefetching.cancel(CLIENT, stage.documents["c"], None, "")
    stage.settle()
    stage.pass_seconds(0.1)
    assert [hint.state for hint in hints.values()] == [HintState.CANCELLED] * 3
    assert stage.counts["hints_cancelled"] == 3
    assert not stage.service.prefetching.hints.live


def test_what_no_hint_can_be_about_is_refused():
    stage = Stage("a")
    for kind, arguments in (
        (GroupNotFound, {"group": "g"}),
        (InvalidRequest, {"queries": 0}),
        (InvalidRequest, {"seconds": -1.0}),
        (InvalidRequest, {"owner": "x" * 1000}),
    ):
        with pytest.raises(kind):
            stage.hint("a", **arguments)
    stage.service.delete(stage.documents["a"])
    with pytest.raises(DocumentNotFound):
        stage.hint("a")


def test_a_read_that_fails_ends_the_hint_with_the_reason():
    stage = Stage("a")
    hint = stage.hint("a")
    stage.end(stage.pending(ReadIn)[0], StorageFailed("the disk says no"))
    stage.settle()
    assert hint.state is HintState.REFUSED
    assert "the disk says no" in hint.reason


def test_a_document_that_leaves_before_its_queries_come_was_brought_for_nothing():
    stage = Stage("ab")
    hint = stage.hint("a")
    stage.settle()
    stage.evict(stage.documents["a"], Tier.DDR)
    assert hint.state is HintState.EVICTED
    assert stage.counts["prefetched_unused"] == 1


def test_an_attach_to_ddr_waits_for_the_reads_of_a_hint_and_hastens_them():
    stage = Stage("a")
    stage.hint("a")
    first, second = stage.pending(ReadIn)
    stage.end(first)
    heard = stage.attach(stage.documents["a"])
    assert stage.effects.hastened == {second.id}
    assert stage.pending(ReadIn) == [second]
    stage.settle()
    assert heard[0].loading.layers == 2


def test_who_was_overtaken_too_often_keeps_later_ones_waiting_until_it_has_its_room():
    stage = Stage("abc", ddr=4)
    stage.documents["large"] = stage.store("large", tokens(9, 4))
    stage.evict(stage.documents["large"], Tier.DDR)
    (attach,) = stage.attach(stage.documents["a"])
    stage.settle()
    large = stage.hint("large")
    large.overtaken = OVERTAKEN_MAX - 1
    stage.hint("b")
    stage.settle()
    stage.use("b")
    stage.evict(stage.documents["b"], Tier.DDR)
    assert large.overtaken == OVERTAKEN_MAX
    later = stage.hint("c")
    stage.pass_seconds(2)
    stage.settle()
    assert (large.state, later.state) == (HintState.WAITING, HintState.WAITING)
    stage.detach(attach)
    stage.settle()
    stage.pass_seconds(2)
    stage.settle()
    assert large.state is HintState.PROMOTED


def test_of_those_that_find_no_room_one_is_looked_at_each_time(monkeypatch):
    """Each before any again: looking takes time, and nobody who asks for something else should wait for it."""
    stage = Stage("abcd", ddr=2, near="a")
    stage.attach(stage.documents["a"])
    hints = [stage.hint(name) for name in "bcd"]
    looks = []
    start_now = stage.service.loader.start_now
    monkeypatch.setattr(
        stage.service.loader,
        "start_now",
        lambda loading, *rest: looks.append(loading.document) or start_now(loading, *rest),
    )
    for _ in range(7):
        stage.pass_seconds(0.3)
    assert [hint.state for hint in hints] == [HintState.WAITING] * 3
    assert len(looks) <= 7
    for _ in range(3):
        stage.service.prefetching.pump()
    looks_before = len(looks)
    stage.service.prefetching.pump()
    assert len(looks) == looks_before, "nothing has changed since all were looked at"
    assert set(looks) == {stage.documents[name] for name in "bcd"}


# Groups ------------------------------------------------------------------------------------------


def test_a_hint_for_a_group_opens_its_shard():
    stage = Stage()
    stage.group()
    hint = stage.hint("a", group="g")
    stage.settle()
    assert hint.state is HintState.PROMOTED
    attach = stage.use("a", "g")
    assert attach.loading.swap.moved_bytes == 0
    assert stage.counts["hints_in_time"] == 1


def test_without_room_in_the_group_a_document_waits_in_ddr():
    """And goes on from there as soon as whoever decodes has gone."""
    stage = Stage("ab")
    stage.group(rows=40)
    (attach,) = stage.attach(stage.documents["a"], "g")
    stage.settle()
    hint = stage.hint("b", group="g")
    stage.settle()
    assert hint.state is HintState.STAGED
    assert "b" in stage.near()
    stage.detach(attach)
    stage.settle()
    assert hint.state is HintState.PROMOTED
    assert [shard.document for shard in stage.state.shards()] == [stage.documents["b"]]


def test_a_cheap_load_may_displace_what_is_dearer_to_bring_back():
    """Its attach would do so anyway, so that only doubt in the hint counts against it."""
    stage = Stage("ab", ddr=2)
    stage.group(rows=40)
    stage.use("a", "g")
    stage.use("b")
    assert stage.near() == {"b"}
    hint = stage.hint("b", group="g")
    stage.settle()
    assert hint.state is HintState.PROMOTED
    assert [shard.document for shard in stage.state.shards()] == [stage.documents["b"]]


def test_an_attach_goes_on_with_the_moves_of_a_hint():
    """Layer by layer, as its own would be: it does not wait until all of it is there."""
    stage = Stage("a")
    stage.group()
    hint = stage.hint("a", group="g")
    stage.end(stage.pending(ReadIn)[0])
    heard = stage.attach(stage.documents["a"], "g")
    assert [attach.loading.group for attach in heard] == ["g"]
    assert hint.state is HintState.USED
    assert "moving" in hint.reason
    assert {order.id for order in stage.pending(ReadIn)} == stage.effects.hastened
    ready = []
    stage.service.wait_layers(CLIENT, heard[0].lease.id, 1, ready.append)
    assert not ready
    stage.settle()
    assert ready == [2]
    swap = heard[0].loading.swap
    assert (swap.outcome, swap.client, swap.moved_bytes) == ("ready", CLIENT, 2 * 16384)
    shard = heard[0].loading.shard
    assert all(copy.holds for copy in shard.copies.values())
    stage.detach(heard[0])
    assert not any(copy.holds for copy in shard.copies.values())


def test_a_group_that_dies_takes_its_hints_with_it():
    stage = Stage("ab")
    stage.group()
    moving, waiting = stage.hint("a", group="g"), stage.hint("b", group="g")
    while not stage.pending(LoadShard):
        stage.end(stage.effects.orders[0])
    stage.service.disconnect(RANKS[0])
    stage.settle()
    stage.pass_seconds(0.1)
    assert moving.state is HintState.REFUSED
    assert waiting.state in (HintState.CANCELLED, HintState.REFUSED)
    assert not stage.service.prefetching.hints.live


@pytest.mark.parametrize("gone", ["document", "group"])
def test_what_is_gone_when_a_load_ends_leaves_nothing_held(gone):
    stage = Stage("ab")
    stage.group(rows=32)
    busy = stage.attach(stage.documents["b"], "g")
    stage.settle()
    assert busy
    hint = stage.hint("a", group="g")
    assert hint.state is HintState.MOVING, "to DDR meanwhile"
    if gone == "document":
        stage.service.delete(stage.documents["a"])
    else:
        stage.service.disconnect(RANKS[0])
    stage.settle()
    assert hint.state is HintState.CANCELLED
    assert not [copy for copy in stage.state.held() if copy.tier is not Tier.HBM]
    assert stage.counts["prefetched_unused"] == 1
