"""A shelf: an engine's objects, where everything that goes wrong is a miss or a dropped store."""

from __future__ import annotations

import logging

import pytest
from holdfast.engine_adapter import shelf as shelf_module
from holdfast.engine_adapter.link import Link
from holdfast.engine_adapter.namespaces import Origin, model_identity
from holdfast.engine_adapter.shelf import Event, Shelf, batches
from holdfast.kvstore.document import checked_name
from holdfast.kvstore.errors import DeadlineExceeded, Draining, PinsOvercommitted
from hypothesis import given
from hypothesis import strategies as st

from daemon_process import until
from fake_objects import FakeStore, World


def origin(**facts) -> Origin:
    return Origin(engine="test", model="/models/some model", facts=facts)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def link(world):
    made = Link(lambda: FakeStore(world), retry_seconds=0.02, rest_seconds=60.0)
    assert made.wait(20.0)
    yield made
    made.close()


@pytest.fixture
def shelf(link):
    return Shelf(link, origin(block=32), tokens_each=32)


def items(*names: str) -> list[tuple[bytes, memoryview]]:
    return [(name.encode(), memoryview((name * 8).encode())) for name in names]


def test_what_was_put_is_found_and_loaded(shelf):
    assert shelf.put(items("a", "b")) == [True, True]
    assert shelf.put(items("b", "c")) == [True, True]
    assert shelf.find([b"a", b"x", b"c"]) == [True, False, True]
    buffers = [bytearray(8), bytearray(8)]
    assert shelf.load_into([b"a", b"c"], [memoryview(buffer) for buffer in buffers]) == [True, True]
    assert buffers == [b"aaaaaaaa", b"cccccccc"]
    assert shelf.counts == {
        Event.STORED: 3, Event.PRESENT: 1, Event.HIT: 2, Event.MISS: 1, Event.LOADED: 2,
        Event.REFUSED: 0, Event.LOST: 0,
    }  # fmt: skip


def test_another_size_is_a_miss(shelf):
    shelf.put(items("a"))
    assert shelf.load_into([b"a"], [memoryview(bytearray(9))]) == [False]
    seen = []
    assert shelf.visit([b"a"], 9, lambda *_: seen.append(1)) == [False]
    assert seen == []
    assert shelf.counts[Event.LOST] == 2


def test_nothing_behind_a_batch_with_a_miss_or_a_refusal_is_tried(shelf, world, monkeypatch):
    monkeypatch.setattr(shelf_module, "BATCH_BYTES", 16)
    shelf.put(items("a", "b", "d", "e"))
    assert world.calls.count(("put", 2)) == 2
    assert world.behind[-2:] == [None, b"b"]  # batches are one chain
    shelf.put(items("e"), b"d")
    assert world.behind[-1] == b"d"
    buffers = [memoryview(bytearray(8)) for _ in range(6)]
    assert shelf.load_into([b"a", b"b", b"c", b"d", b"e", b"e"], buffers) == [True, True, False, True, False, False]
    assert [bytes(found) if found is not None else None for found in shelf.copies([b"a", b"x"])] == [b"a" * 8, None]
    world.room = 5
    assert shelf.put(items("f", "g", "a", "b")) == [True, False, False, False]
    assert shelf.counts[Event.REFUSED] == 1


def test_visited_content_comes_in_order(shelf):
    shelf.put(items("a", "b"))
    seen: list[tuple[int, bytes]] = []
    assert shelf.visit([b"a", b"b", b"c"], 8, lambda n, view: seen.append((n, bytes(view)))) == [True, True, False]
    assert seen == [(0, b"aaaaaaaa"), (1, b"bbbbbbbb")]


@pytest.mark.parametrize("error", [Draining("going"), DeadlineExceeded("slow")])
def test_a_daemon_that_cannot_answer_is_a_miss(shelf, world, error):
    shelf.put(items("a"))
    world.error = error
    assert shelf.find([b"a", b"b"]) == [False, False]
    assert shelf.load_into([b"a"], [memoryview(bytearray(8))]) == [False]
    assert shelf.put(items("q")) == [False]
    assert shelf.pin([b"a"], 1.0, "me", "") == 0
    assert not shelf.clear()
    shelf.touch([b"a"])
    assert shelf.counts[Event.UNANSWERED] == 5
    slow = isinstance(error, DeadlineExceeded)
    asked = [call for call, _ in world.calls[world.calls.index(("find", 2)) :]]
    assert asked == (["find"] if slow else ["find", "load", "put", "pin", "clear", "touch"])  # a slow one rests


def test_a_daemon_that_went_away_is_a_miss_until_it_is_back(shelf, world, link):
    shelf.put(items("a"))
    world.go_away()
    assert shelf.find([b"a"]) == [False]
    world.there = True
    until(lambda: link.is_up, "it connects again")
    assert shelf.find([b"a"]) == [True]


def test_pins_touches_and_clearing(shelf, world):
    shelf.put(items("a", "b"))
    assert shelf.pin([b"a", b"x"], 60.0, "me", "because") == 1
    assert world.pins == [([b"a", b"x"], 60.0, "me", "because")]
    shelf.touch([b"b"])
    assert world.touched == [b"b"]
    assert shelf.clear()
    assert world.of("test-some-model-") == {}


def test_a_pin_that_is_refused_is_counted_as_that(shelf, world):
    shelf.put(items("a", "b"))
    world.error = PinsOvercommitted("too many")
    assert shelf.pin([b"a", b"b"], 60.0, "me", "") == 0
    assert shelf.counts[Event.REFUSED] == 2
    assert shelf.counts[Event.UNANSWERED] == 0


def test_a_changed_layout_is_said_with_its_reason(link, caplog):
    first = Shelf(link, origin(block=32, dtype="bf16"))
    assert first.put(items("a")) == [True]
    with caplog.at_level(logging.WARNING):
        assert Shelf(link, origin(block=32, dtype="bf16")).find([b"a"]) == [True]
        assert caplog.text == ""
        assert Shelf(link, origin(block=64, dtype="bf16", rank=0)).find([b"a"]) == [False]
    assert "block: 32 -> 64, rank: None -> 0" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Shelf(link, Origin(engine="test", model="/models/some model", part="rank 1", facts={"block": 99})).find([b"a"])
    assert caplog.text == ""  # another rank is no change


def test_namespaces_differ_by_anything_and_are_names():
    names = {
        Origin(engine=engine, model=model, facts=facts).namespace
        for engine in ("a", "b")
        for model in ("x/y", "z/y", "..", "/m/" + "long" * 80)
        for facts in ({}, {"p": 1}, {"p": "1"}, {"q": 1})
    }
    assert len(names) == 2 * 4 * 4
    for name in names:
        checked_name(name)
    assert (
        Origin(engine="a", model="m", facts={"p": 1, "q": 2}).namespace
        == Origin(engine="a", model="m", facts={"q": 2, "p": 1}).namespace
    )


def test_a_model_directory_is_known_by_its_content(tmp_path):
    assert model_identity("org/name") == "org/name"
    (tmp_path / "weights.bin").write_bytes(b"1" * 64)
    before = model_identity(str(tmp_path))
    assert before == model_identity(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"2" * 65)
    assert before != model_identity(str(tmp_path))


@given(st.lists(st.integers(0, 100), max_size=60), st.integers(1, 100), st.integers(1, 9))
def test_batches_cover_everything_in_order_within_their_limits(sizes, limit_bytes, limit_keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf_module, "BATCH_BYTES", limit_bytes)
        patch.setattr(shelf_module, "BATCH_KEYS", limit_keys)
        found = list(batches(sizes))
    assert [index for start, stop in found for index in range(start, stop)] == list(range(len(sizes)))
    for start, stop in found:
        assert stop - start == 1 or sum(sizes[start:stop]) <= limit_bytes
        assert 1 <= stop - start <= limit_keys
