"""The crash harness, shortly; `make soak` runs it for longer. And its model: it must be able to object."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from crash_harness import NAMES, TENANTS, Entry, Model, Violation, content_of, run, some_life, tokens_of
from fakes import EXTENT_TOKENS

SEED = 20261121
LIVES = 20


def test_random_work_with_kills_keeps_every_promise():
    harness = run(SEED, lives=LIVES)
    counts = harness.counts
    assert counts["lives"] == LIVES
    assert counts["kills"] > LIVES // 2
    assert harness.struck.total() > 0
    assert counts["documents read"] > LIVES


def test_what_is_done_is_decided_by_the_seed_alone():
    first, again, other = random.Random(1), random.Random(1), random.Random(2)
    lives = [some_life(first) for _ in range(20)]
    assert lives == [some_life(again) for _ in range(20)]
    assert lives != [some_life(other) for _ in range(20)]


def test_documents_that_share_tokens_share_bytes():
    tenant = TENANTS[0][0]
    for one in NAMES:
        for other in NAMES:
            for start in range(0, min(len(tokens_of(one)), len(tokens_of(other))), EXTENT_TOKENS):
                stop = start + EXTENT_TOKENS
                same = tokens_of(one)[:stop].tolist() == tokens_of(other)[:stop].tolist()
                assert same == (content_of(tenant, one, start) == content_of(tenant, other, start))


def shown(**changes):
    return SimpleNamespace(**{"durable": True, "complete": True} | changes)


NAME = NAMES[0]
DURABLE = {("red", NAME): Entry(present=True, durable=True)}


@pytest.mark.parametrize(
    ("entries", "seen", "whole"),
    [
        (DURABLE, {}, set()),  # gone
        (DURABLE, {NAME: shown()}, set()),  # not whole
        ({}, {NAME: shown()}, {NAME}),  # came back
    ],
)
def test_the_model_objects_to_what_a_new_daemon_shows(entries, seen, whole):
    with pytest.raises(Violation):
        Model(entries=dict(entries)).reborn("red", seen, whole)


@pytest.mark.parametrize(
    ("operation", "outcome", "look"),
    [
        (["read", "red", NAME], "absent", None),
        (["read", "red", NAME], "incomplete", None),
        (["read", "red", NAMES[1]], "ok", None),
        (["delete", "red", NAME], "ok", {"durable": True, "complete": True}),
        (["read", "red", NAME], "ok", {"durable": True, "complete": False}),
    ],
)
def test_the_model_objects_to_answers(operation, outcome, look):
    with pytest.raises(Violation):
        Model(entries=dict(DURABLE)).ended(operation, outcome, look)


def test_the_model_allows_what_the_promises_leave_open():
    model = Model(entries={("red", NAME): Entry(present=True)})
    model.reborn("red", {}, set())  # it was never durable
    model = Model(entries=dict(DURABLE))
    model.lost(["delete", "red", NAME])
    model.reborn("red", {NAME: shown()}, {NAME})  # the deletion was not answered
    model.ended(["free", "red", NAME, "none"], "ok", {"durable": True, "complete": False})
    model.reborn("red", {NAME: shown(complete=False)}, set())
    model.ended(["delete", "red", NAME], "ok", None)
    model.reborn("red", {}, set())
