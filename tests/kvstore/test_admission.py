"""Admission to NVMe: what DDR evicts is written if that pays; promises are kept whatever it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.costs import LinkSpeed
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.ledger import Hop
from holdfast.kvstore.orders import WriteOut
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.reuse import WEAR, Decision, write_price_ns
from holdfast.kvstore.service import NS

from scene import Scene, named, tokens

WRITE = Hop(Tier.DDR, Tier.NVME)


class Doubtful(Scene):
    """Writing an extent costs 0.8 ms, wear included, and recomputing it 1.3 ms; few documents ever came back."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.service.planner.links[WRITE] = LinkSpeed(bytes_per_second=3e7, latency_ns=0)
        for number in range(20):
            self.store(f"gone-{number}", tokens(200 + number, 1), WritePolicy.MEMORY)
            self.service.delete(named(f"gone-{number}"))
        self.settle()
        self.clock.advance(901 * NS)

    def press(self, extents=8):
        """Somebody needs all of DDR; what that has written is under way."""
        ingest, _ = self.begin("new", tokens(99, extents))
        return ingest

    def written(self):
        return len(self.pending(WriteOut))


def last_verdicts(scene, document):
    return [v for v in scene.state.ledger.verdicts if str(document) in v.documents]


def test_what_would_not_pay_is_dropped_and_the_verdict_says_why():
    scene = Doubtful()
    document = scene.store("a", tokens(1, 4), WritePolicy.AUTO)
    assert scene.state.documents[document].decision.policy is WritePolicy.BACK
    scene.press()
    assert scene.written() == 0
    scene.settle()
    assert scene.tiers(document) == [set()] * 4
    verdicts = last_verdicts(scene, document)
    assert [v.action for v in verdicts] == ["drop"] * 4
    assert "pressure, not written: saves " in verdicts[0].reason
    assert "comebacks, costs 0.00328 s to write" in verdicts[0].reason
    assert scene.state.ledger.counts["not_worth_writing"] == 4
    (one,) = scene.state.departures.of(document).departures
    assert (one.action, one.copies) == ("drop", 4)
    assert scene.state.quality.tiers[Tier.DDR].evicted == 4


def test_losing_what_would_not_be_written_costs_a_recompute():
    """So it is kept longer than what NVMe would take."""
    scene = Doubtful()
    document = scene.store("a", tokens(1, 4), WritePolicy.AUTO)
    planner, record = scene.service.planner, scene.state.extents[scene.state.documents[document].document.extents[-1]]
    assert planner.restore_ns(record, record.ddr) == planner.recompute_ns(record)
    scene.state.documents[document].document = replace(
        scene.state.documents[document].document, write_policy=WritePolicy.BACK
    )
    assert planner.restore_ns(record, record.ddr) == planner.reload_ns(record, Tier.NVME, Tier.DDR)


@pytest.mark.parametrize("how", ["write-back", "came back", "pinned", "grown", "announced", "expected", "restarted"])
def test_a_promise_or_a_certainty_is_written(how):
    scene = Doubtful(ddr=8, nvme=16)
    policy = WritePolicy.BACK if how == "write-back" else WritePolicy.AUTO
    document = scene.store("a", tokens(1, 4), policy)
    owner = scene.state.documents[document]
    match how:
        case "came back":
            heard = scene.attach(document)
            scene.settle()
            scene.detach(heard[0])
        case "pinned":
            scene.service.pin(document, Tier.NVME, None, "me", "")
        case "grown":  # its new version is pinned as the one before was
            scene.service.pin(document, Tier.DDR, None, "me", "", kind=PinKind.SOFT)
            owner.decision = Decision(WritePolicy.BACK, "as decided for the new version")
        case "announced":
            scene.service.prefetching.hint(5, document, None, 1, None, "")
        case "expected":
            scene.service.planner.links[WRITE] = LinkSpeed(bytes_per_second=1e12, latency_ns=0)
        case "restarted":
            owner.decision = None
    scene.press()
    scene.settle()
    assert scene.tiers(document) == [{Tier.NVME}] * 4
    assert scene.state.ledger.counts["not_worth_writing"] == 0


def test_what_was_begun_is_finished():
    """A chain whose tail is on NVMe, and whose front is not, serves nobody."""
    scene = Doubtful()
    document = scene.store("a", tokens(1, 4), WritePolicy.AUTO)
    fast, slow = LinkSpeed(bytes_per_second=1e12, latency_ns=0), scene.service.planner.links[WRITE]
    scene.service.planner.links[WRITE] = fast
    ingest = scene.press(6)
    scene.settle()
    scene.service.abort_ingest(ingest.client, ingest.id)
    scene.settle()
    assert scene.tiers(document) == [{Tier.DDR}] * 2 + [{Tier.NVME}] * 2
    scene.service.planner.links[WRITE] = slow
    scene.press(8)
    scene.settle()
    assert scene.tiers(document) == [{Tier.NVME}] * 4


def test_an_operator_who_frees_is_obeyed_and_a_clean_stop_writes_all():
    scene = Doubtful(ddr=8, nvme=16)
    document, other = (scene.store(name, tokens(seed, 2), WritePolicy.AUTO) for seed, name in ((1, "a"), (2, "b")))
    scene.evict(document, Tier.DDR)
    assert scene.tiers(document) == [{Tier.NVME}] * 2
    scene.service.write_back()
    scene.settle()
    assert scene.tiers(other) == [{Tier.DDR, Tier.NVME}] * 2


def test_a_dry_run_says_the_same_and_changes_nothing():
    scene = Doubtful()
    document = scene.store("a", tokens(1, 4), WritePolicy.AUTO)
    extents = scene.state.documents[document].document.extents
    records = [scene.state.extents[extent] for extent in extents]
    first = [scene.service.planner.admission.refusal(record) for record in records]
    assert first[0].startswith("not written: saves ")
    assert [scene.service.planner.admission.refusal(record) for record in records] == first
    assert not scene.state.documents[document].admitted


def test_the_background_drops_nothing_that_does_not_pay():
    scene = Doubtful(ddr_marks=(0.3, 0.1))
    document = scene.store("a", tokens(1, 4), WritePolicy.AUTO)
    scene.service.tick()
    scene.settle()
    assert scene.tiers(document) == [{Tier.DDR}] * 4


def test_the_price_of_writing():
    assert write_price_ns(10**9, LinkSpeed(bytes_per_second=1e9, latency_ns=0)) == WEAR * NS
