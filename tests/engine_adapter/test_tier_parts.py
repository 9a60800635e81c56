"""What the tier for vLLM stands on, without vLLM: lookups, transfers, errands, hints."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from holdfast.engine_adapter.vllm import verdicts as verdicts_module
from holdfast.engine_adapter.vllm.errands import WAITING_MAX, Errands
from holdfast.engine_adapter.vllm.hints import Answer, PinHint, read
from holdfast.engine_adapter.vllm.transfers import Kind, Transfer, Transfers
from holdfast.engine_adapter.vllm.verdicts import FOUND_SECONDS, MISSED_SECONDS, Verdicts

from daemon_process import until

DEADLINE_SECONDS = 0.5


class Desk:
    """Lookups whose errands wait until a test does them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.there: set[bytes] = set()
        self.asked: list[list[bytes]] = []
        self.errands: list = []
        self.full = False
        self.lookups = Verdicts(self.find, self.run, DEADLINE_SECONDS, clock=lambda: self.now)

    def find(self, keys):
        self.asked.append(list(keys))
        return [key in self.there for key in keys]

    def run(self, errand) -> bool:
        if not self.full:
            self.errands.append(errand)
        return not self.full

    def answer(self) -> None:
        while self.errands:
            self.errands.pop(0)()


def test_one_steps_keys_are_asked_together_and_known_a_step_later():
    desk = Desk()
    desk.there = {b"a"}
    assert [desk.lookups.verdict(key) for key in (b"a", b"b", b"a")] == [None, None, None]
    desk.lookups.hand_over()
    desk.lookups.hand_over()  # an empty step asks nothing
    desk.answer()
    assert [desk.lookups.verdict(key) for key in (b"a", b"b")] == [True, False]
    assert desk.asked == [[b"a", b"b"]]


def test_verdicts_hold_for_a_while_and_what_is_learnt_counts_at_once():
    desk = Desk()
    desk.lookups.found([b"a"])
    desk.lookups.missed([b"b"])
    assert (desk.lookups.verdict(b"a"), desk.lookups.verdict(b"b")) == (True, False)
    desk.now += MISSED_SECONDS
    assert (desk.lookups.verdict(b"a"), desk.lookups.verdict(b"b")) == (True, None)
    desk.lookups.hand_over()
    desk.answer()
    desk.now += FOUND_SECONDS
    assert desk.lookups.verdict(b"a") is None


def test_nobody_waits_longer_than_the_deadline_nor_begins_to_wait_behind_one_who_did():
    desk = Desk()
    assert desk.lookups.verdict(b"a") is None
    desk.lookups.hand_over()
    desk.now += DEADLINE_SECONDS * 0.9
    assert desk.lookups.verdict(b"a") is None
    desk.now += DEADLINE_SECONDS * 0.2
    assert desk.lookups.verdict(b"a") is False
    assert desk.lookups.verdict(b"new") is False
    desk.there = {b"a", b"new"}
    desk.answer()
    assert desk.lookups.verdict(b"a") is True
    assert desk.lookups.verdict(b"new") is None


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr(verdicts_module, "KNOWN_MAX", 10)
    desk = Desk()
    keys = [bytes([number]) for number in range(30)]
    assert [desk.lookups.verdict(key) for key in keys] == [None] * 10 + [False] * 20
    desk.full = True
    desk.lookups.hand_over()  # too many errands: a miss for now
    assert desk.lookups.verdict(keys[0]) is False
    desk.lookups.found(keys)
    assert [desk.lookups.verdict(key) for key in keys[20:]] == [True] * 10
    assert desk.lookups.verdict(keys[19]) is None


# Transfers -------------------------------------------------------------------------------------


class Carrier:
    """Carries transfers out when it is let."""

    def __init__(self, **objects_max: int) -> None:
        self.gate = threading.Semaphore(0)
        self.seen: list[int] = []
        self.fails: set[int] = set()
        self.began = threading.Semaphore(0)
        limits = {Kind.LOAD: objects_max.get("load", 8), Kind.STORE: objects_max.get("store", 8)}
        self.transfers = Transfers(self.carry, threads={Kind.LOAD: 1, Kind.STORE: 1}, objects_max=limits)

    def carry(self, transfer: Transfer) -> list[bool]:
        self.began.release()
        assert self.gate.acquire(timeout=20.0)
        self.seen.append(transfer.number)
        if transfer.number in self.fails:
            raise ValueError("our bug")
        return [key != b"bad" for key in transfer.keys]

    def go(self, number: int, kind: Kind = Kind.STORE, keys: tuple[bytes, ...] = (b"k",)) -> bool:
        return self.transfers.submit(Transfer(number, kind, keys, tuple(range(len(keys)))))


def test_transfers_end_in_order_with_their_outcome_by_key():
    carrier = Carrier()
    assert carrier.go(1, keys=(b"a", b"bad"))
    assert carrier.go(2)
    assert carrier.transfers.ended() == []
    carrier.gate.release(2)
    ended: list = []
    until(lambda: ended.extend(carrier.transfers.ended()) or len(ended) == 2, "both end")
    assert [(one.transfer.number, one.done) for one in ended] == [(1, (True, False)), (2, (True,))]
    assert carrier.transfers.objects_waiting == {Kind.LOAD: 0, Kind.STORE: 0}
    assert carrier.transfers.close()


def test_a_full_lane_refuses_and_the_other_does_not_notice():
    carrier = Carrier(store=2)
    assert carrier.go(1, keys=(b"a", b"b", b"c"))  # larger than the lane, but alone
    assert not carrier.go(2)
    assert carrier.go(3, Kind.LOAD)
    carrier.gate.release(2)
    until(lambda: len(carrier.seen) == 2, "both are carried out")
    assert carrier.transfers.close()


def test_draining_gives_up_what_waits_and_waits_for_what_has_begun():
    carrier = Carrier()
    assert carrier.go(1)
    assert carrier.began.acquire(timeout=20.0)
    assert carrier.go(2)
    assert not carrier.transfers.drain(0.0)  # one is under way
    assert [(one.transfer.number, one.done) for one in carrier.transfers.ended()] == [(2, (False,))]
    carrier.gate.release()
    assert carrier.transfers.drain(20.0)
    assert [(one.transfer.number, one.done) for one in carrier.transfers.ended()] == [(1, (True,))]
    assert carrier.go(3)  # it goes on
    carrier.gate.release()
    assert carrier.transfers.close()
    assert not carrier.go(4)


def test_a_transfer_that_fails_by_our_bug_is_a_failure_and_no_hang(caplog):
    carrier = Carrier()
    carrier.fails = {1}
    carrier.go(1)
    carrier.go(2)
    carrier.gate.release(2)
    ended: list = []
    until(lambda: ended.extend(carrier.transfers.ended()) or len(ended) == 2, "both end")
    assert [one.done for one in ended] == [(False,), (True,)]
    assert "our bug" in caplog.text
    assert carrier.transfers.close()


def test_errands_are_done_in_order_and_dropped_when_too_many_wait(caplog):
    errands = Errands()
    gate, done = threading.Event(), []
    assert errands.run(lambda: gate.wait(20.0))
    assert errands.run(lambda: 1 / 0)  # our bug
    taken = sum(errands.run(lambda number=number: done.append(number)) for number in range(2 * WAITING_MAX))
    assert WAITING_MAX - 2 <= taken <= WAITING_MAX
    gate.set()
    errands.close()
    assert done == list(range(taken))
    assert "an errand failed" in caplog.text


# Hints -----------------------------------------------------------------------------------------


def action(kind: str = "pin", version: str = "1", **payload) -> SimpleNamespace:
    return SimpleNamespace(action_id="a7", action_type=kind, action_version=version, payload=payload)


@pytest.mark.parametrize(
    ("actions", "pin", "answers"),
    [
        ([], None, []),
        ([action()], PinHint(ttl_seconds=3600.0, reason="a7"), [Answer.ACCEPTED]),
        (
            [action(ttl_seconds=60, owner="me", reason="demo")],
            PinHint(ttl_seconds=60, owner="me", reason="demo"),
            [Answer.ACCEPTED],
        ),
        ([action(ttl_seconds=1e9)], PinHint(ttl_seconds=7200.0, reason="a7"), [Answer.CLIPPED]),
        (
            [action(ttl_seconds=5), action(ttl_seconds=9), action("evict"), action(version="2")],
            PinHint(ttl_seconds=9, reason="a7"),
            [Answer.ACCEPTED, Answer.ACCEPTED, Answer.UNKNOWN, Answer.UNKNOWN],
        ),
        ([action(ttl_seconds=0)], None, [Answer.REFUSED]),
        ([action(ttl_seconds=True)], None, [Answer.REFUSED]),
        ([action(ttl_seconds="60")], None, [Answer.REFUSED]),
        ([action(ttl_seconds=float("nan"))], None, [Answer.REFUSED]),
        ([action(owner=7)], None, [Answer.REFUSED]),
    ],
)
def test_hints_are_read_and_answered(actions, pin, answers):
    assert read(actions, 7200.0) == (pin, answers)
