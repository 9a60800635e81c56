"""Whose turn it is: classes, places, shares."""

from __future__ import annotations

import pytest
from holdfast.kvstore.orders import Urgency
from holdfast.kvstore.transfers import PASSES_MAX, Transfers
from hypothesis import given
from hypothesis import strategies as st

ATTACH, DEMOTE, PREFETCH, WRITE, RELIEF, SCRUB = Urgency


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


@pytest.mark.parametrize(("workers", "others"), [(1, 1), (2, 1), (3, 2), (4, 3), (6, 4), (8, 6)])
def test_a_third_of_the_workers_is_kept_for_attaches(workers, others):
    transfers = filled(workers, {WRITE: 20, PREFETCH: 20})
    for _ in range(others):
        assert transfers.pop()[0] is PREFETCH
    assert transfers.pop() is None, "the others stay idle"
    transfers.push(ATTACH, 0, "attach")
    assert (transfers.pop() == (ATTACH, "attach")) or workers == 1
    transfers.done(PREFETCH)
    assert transfers.pop() is not None


def test_half_of_the_workers_are_theirs_while_attaches_wait():
    transfers = filled(6, {WRITE: 8})
    for _ in range(4):
        assert transfers.pop()[0] is WRITE
    for index in range(3 * PASSES_MAX):
        transfers.push(ATTACH, index, "attach")
    transfers.done(WRITE)
    for _ in range(2 * PASSES_MAX):  # three workers write, so the share does not count
        assert transfers.pop()[0] is ATTACH
        transfers.done(ATTACH)
    transfers.done(WRITE)
    for _ in range(PASSES_MAX):
        assert transfers.pop()[0] is ATTACH
        transfers.done(ATTACH)
    assert len(transfers) == 4
    assert transfers.pop()[0] is WRITE


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
    """Any schedule: every piece once; a worker gets one if any may be taken; attaches keep their workers."""
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
            most = max(1, workers // 2 if attach_waits else workers - max(1, workers // 3))
            may = [kind for kind in waiting.values() if kind is ATTACH or others < most]
            assert (found is None) == (not may)
            if found is None:
                continue
            kind, piece = found
            assert waiting.pop(piece) is kind
            assert kind in may
            running.append(kind)
        elif step == "done" and running:
            transfers.done(running.pop(place % len(running)))
    assert len(transfers) == len(waiting)


def test_what_somebody_waits_for_by_now_goes_with_attaches_in_its_place():
    transfers = Transfers(1)
    for place, piece in enumerate("abcd"):
        transfers.push(PREFETCH, place, piece)
    transfers.push(DEMOTE, 0, "demoted")
    transfers.push(ATTACH, 2, "attached")
    assert transfers.hasten(lambda piece: piece in "bd") == 2
    assert transfers.hasten(lambda piece: piece in "bd") == 0
    assert taken(transfers, 6) == ["b", "attached", "d", "demoted", "a", "c"]
