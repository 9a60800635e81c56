"""The tree of errors is what its docstring says, and nothing in it is dead."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import holdfast.kvstore.errors as module
import msgspec
import pytest
from holdfast.kvstore.errors import HoldfastError, NoCapacity, all_errors, from_code
from holdfast.kvstore.frames import Answer, decode_answer, encode
from holdfast.kvstore.holders import HOLDERS_MAX, Holder, Kind, largest
from holdfast.kvstore.wire import Refused

from holdfast.rest import _problem

ROOT = Path(__file__).resolve().parents[2]
SIZES = (("a", 1), ("b", 6), ("c", 2), ("d", 5))
ROOMS = ("kvstore", "eviction", "engine_adapter", "ring_attention", "holdfast")


def documented():
    """(name, parent) of each line of the docstring's tree."""
    pairs = []
    path = []
    for line in module.__doc__.splitlines():
        if line.startswith(("HoldfastError", "|", "`--")):
            depth = len(line) - len(line.lstrip("|`- "))
            name = line[depth:].split()[0]
            level = depth // 4
            path = [*path[:level], name]
            pairs.append((name, path[-2] if level else "Exception"))
    return pairs


def ours():
    """The classes that the module defines."""
    return [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, HoldfastError)]


def test_the_docstring_is_the_tree():
    """Whoever reads the tree reads the truth."""
    assert set(documented()) == {(kind.__name__, kind.__bases__[0].__name__) for kind in ours()}


def test_codes_are_unique_and_lead_back():
    """A code on the wire names one class; an unknown one keeps its text."""
    codes = {kind.code for kind in ours()}
    assert len(codes) == len(ours())
    assert codes <= set(all_errors())
    for kind in ours():
        rebuilt = from_code(kind.code, "why")
        assert type(rebuilt) is kind
        assert rebuilt.message == "why"
    assert from_code("novel", "why").message == "novel: why"


def test_holders_travel_with_their_error():
    """Over the socket as in a problem: whoever is refused can say who has to let go."""
    holder = Holder(
        kind=Kind.PIN, owner="ops", tenant="t", document="a", tier="ddr", size_bytes=5, remaining_seconds=1.5
    )
    refusal = Answer(
        7, Refused("no-capacity", "full", [holder, replace(holder, kind=Kind.LEASE, remaining_seconds=None)])
    )
    assert decode_answer(encode(refusal)[4:]) == refusal
    with pytest.raises(NoCapacity) as raised:
        raise from_code(refusal.body.code, refusal.body.message, refusal.body.holders)
    assert raised.value.holders == tuple(refusal.body.holders)
    told = _problem(json.loads(msgspec.json.encode({"code": "no-capacity", "holders": [holder]})), 507, "x")
    assert told.holders == (holder,)


def test_the_largest_holders_are_named_first_and_no_more_than_it_takes():
    """Enough to make room, in an order that does not change."""
    holders = [Holder(kind=Kind.PIN, owner="o", tenant="t", document=d, tier="ddr", size_bytes=b) for d, b in SIZES]
    assert [h.document for h in largest(holders)] == ["b", "d", "c", "a"]
    assert [h.document for h in largest(holders, 1)] == ["b"]
    assert [h.document for h in largest(holders, 10)] == ["b", "d"]
    assert largest(holders, 0) == ()
    assert len(largest(holders * HOLDERS_MAX)) == HOLDERS_MAX


def test_every_leaf_is_raised_somewhere():
    """An error that nobody raises is a promise that nobody keeps."""
    parents = {parent for _, parent in documented()}
    made = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    made.add(node.func.id)
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
                    made.add(node.exc.id)
    assert {name for name, _ in documented()} - parents <= made
