"""The tree of errors is what its docstring says, and nothing in it is dead."""

import ast
from pathlib import Path

import holdfast.kvstore.errors as module
from holdfast.kvstore.errors import HoldfastError, all_errors, from_code

ROOT = Path(__file__).resolve().parents[2]
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
