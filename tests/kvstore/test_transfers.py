"""Whose turn it is: classes, places, shares."""

from __future__ import annotations

from holdfast.kvstore.orders import Urgency
from holdfast.kvstore.transfers import PASSES_MAX, Transfers
from hypothesis import given
from hypothesis import strategies as st

ATTACH, DEMOTE, PREFETCH, WRITE, SCRUB = Urgency


def filled(workers, counts):
    transfers = Transfers(workers)
    for urgency, count in counts.items():
        for index in range(count):
            transfers.push(urgency, index, f"{urgency.name}{index}")
    return transfers


def taken(transfers, count):
    """Pop one after the other, as a single worker would."""
    found = []
    for _ in range(count):
        urgency, piece = transfers.pop()
        transfers.done(urgency)
        found.append(piece)
    return found


def test_by_class_then_place_then_age():
    transfers = Transfers(1)
    for urgency, place, piece in [
        (WRITE, 0, "f"),
        (DEMOTE, 1, "e"),
        (DEMOTE, 0, "c"),
        (ATTACH, 5, "b"),
        (DEMOTE, 0, "d"),
    ]:
        transfers.push(urgency, place, piece)
    transfers.push(ATTACH, 2, "a")
    assert len(transfers) == 6
    assert taken(transfers, 6) == list("abcdef")
    assert transfers.pop() is None


def test_pieces_are_never_compared():
    transfers = Transfers(1)
    transfers.push(ATTACH, 0, object())
    transfers.push(ATTACH, 0, object())
    assert transfers.pop()
    assert transfers.pop()


def test_others_keep_to_half_of_the_workers_while_an_attach_waits():
    transfers = filled(4, {WRITE: 8})
    assert [transfers.pop()[0] for _ in range(4)] == [WRITE] * 4  # nobody waits: all workers serve the rest
    for index in range(3 * PASSES_MAX):
        transfers.push(ATTACH, index, "attach")
    transfers.done(WRITE)
    for _ in range(2 * PASSES_MAX):  # three workers write, so the share does not count
        assert transfers.pop()[0] is ATTACH
        transfers.done(ATTACH)
    transfers.done(WRITE)
    transfers.done(WRITE)
    assert transfers.pop()[0] is WRITE, "one of two that may"
    assert transfers.pop()[0] is ATTACH


def test_a_class_that_waits_has_its_turn():
    transfers = filled(1, {ATTACH: 100, DEMOTE: 100, WRITE: 100})
    classes = [piece.rstrip("0123456789") for piece in taken(transfers, 3 * (PASSES_MAX + 1))]
    for start in range(2 * (PASSES_MAX + 1)):
        window = classes[start : start + PASSES_MAX + 2]
        assert {"ATTACH", "DEMOTE", "WRITE_THROUGH"} == set(window)
    assert classes.count("ATTACH") >= 40


def test_one_worker_still_serves_everybody():
    transfers = filled(1, {ATTACH: 2 * PASSES_MAX, WRITE: 1})
    assert taken(transfers, PASSES_MAX + 1)[-1] == "WRITE_THROUGH0"


def test_clear_forgets_what_waits_and_not_what_runs():
    transfers = filled(2, {WRITE: 3})
    urgency, _ = transfers.pop()
    transfers.clear()
    assert len(transfers) == 0
    assert transfers.pop() is None
    transfers.done(urgency)


@given(
    workers=st.integers(1, 8),
    steps=st.lists(
        st.tuples(st.sampled_from(["push", "pop", "done"]), st.sampled_from(list(Urgency)), st.integers(0, 3))
    ),
)
def test_nothing_is_lost(workers, steps):
    """Any schedule: every piece once; an idle worker always gets one; and attaches keep half of the workers."""
    transfers, waiting, running, number = Transfers(workers), {}, [], 0
    for step, urgency, place in steps:
        if step == "push":
            transfers.push(urgency, place, number)
            waiting[number] = urgency
            number += 1
        elif step == "pop" and len(running) < workers:
            attach_waits = ATTACH in waiting.values()
            others = sum(kind is not ATTACH for kind in running)
            found = transfers.pop()
            assert (found is None) == (not waiting)
            if found is None:
                continue
            kind, piece = found
            assert waiting.pop(piece) is kind
            running.append(kind)
            if attach_waits and others >= max(1, workers // 2):
                assert kind is ATTACH
        elif step == "done" and running:
            transfers.done(running.pop(place % len(running)))
    assert len(transfers) == len(waiting)
