"""The house keeps its order: rooms, floors, leaves, clocks, handlers, sizes.

Every rule is a function of (path, source) that yields what is wrong, so every rule is also shown a
planted violation below: a check must be able to fail. To change the house, change the tables.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRONT_DOOR = "holdfast"

# Which other rooms a room may import. Nothing imports the front door.
ROOMS = {
    "eviction": set(),
    "kvstore": {"eviction"},
    "ring_attention": {"kvstore"},
    "engine_adapter": {"ring_attention", "kvstore"},
    FRONT_DOOR: {"eviction", "kvstore", "ring_attention", "engine_adapter"},
}

# Inside kvstore a module imports its own floor and those below: nouns < rules < effects < edges.
FLOORS = ("nouns", "rules", "effects", "service", "edges")  # an arrow may point to its own floor and below
APART = {("service", "effects")}  # except these: the service hands out orders and moves no byte
FLOOR_OF = {
    "allowed": "nouns",
    "clock": "nouns",
    "config": "nouns",
    "costs": "nouns",
    "document": "nouns",
    "errors": "nouns",
    "extent": "nouns",
    "geometry": "nouns",
    "holders": "nouns",
    "keys": "nouns",
    "calibration": "nouns",
    "layout": "nouns",
    "opaque": "nouns",
    "seal": "nouns",
    "sections": "nouns",
    "sizes": "nouns",
    "spec": "nouns",
    "arrivals": "rules",
    "audit": "rules",
    "audit_state": "rules",
    "claims": "rules",
    "clearing": "rules",
    "contest": "rules",
    "demand": "rules",
    "departures": "rules",
    "documents": "rules",
    "parting": "rules",
    "changes": "rules",
    "bypass": "nouns",
    "switching": "service",
    "keying": "edges",
    "model_clearing": "edges",
    "model_messages": "edges",
    "model_admin": "edges",
    "router_admin": "edges",
    "bypass_admin": "edges",
    "kv_events": "edges",
    "event_publisher": "edges",
    "quality": "rules",
    "admission": "rules",
    "quality_view": "edges",
    "pauses": "edges",
    "explain_view": "edges",
    "explain_wire": "edges",
    "explain_admin": "edges",
    "findings": "rules",
    "forests": "rules",
    "fronts": "rules",
    "prompts": "rules",
    "owners": "rules",
    "ledger": "rules",
    "lines": "rules",
    "orders": "rules",
    "pinning": "rules",
    "placing": "rules",
    "planner": "rules",
    "precedence": "rules",
    "prefills": "rules",
    "prefix": "rules",
    "prefix_wire": "edges",
    "mappings": "edges",
    "putting": "service",
    "getting": "service",
    "objects": "service",
    "object_messages": "edges",
    "object_requests": "edges",
    "object_client": "edges",
    "object_views": "edges",
    "object_routes": "edges",
    "prices": "rules",
    "quotas": "rules",
    "residency": "rules",
    "reuse": "rules",
    "rows": "rules",
    "shard_forest": "rules",
    "shared_ranking": "rules",
    "slots": "rules",
    "state": "rules",
    "tenancy": "rules",
    "transfers": "rules",
    "upcoming": "rules",
    "uses": "rules",
    "recent": "rules",
    "hints": "rules",
    "arena": "effects",
    "backing": "effects",
    "catalog": "effects",
    "catalog_rows": "effects",
    "check": "effects",
    "inspector": "effects",
    "verify": "effects",
    "gpus": "effects",
    "measure": "effects",
    "machine": "effects",
    "mover": "effects",
    "ownership": "effects",
    "prefault": "effects",
    "processes": "effects",
    "segments": "effects",
    "warm": "effects",
    "adoption": "service",
    "attach": "service",
    "early": "service",
    "awaiting": "service",
    "enrol": "service",
    "expiry": "service",
    "free_admin": "edges",
    "freeing": "edges",
    "growth": "service",
    "ingest": "service",
    "drafting": "service",
    "transients": "service",
    "ingesting": "service",
    "keeping": "service",
    "loader": "service",
    "loading": "service",
    "making": "service",
    "measurements": "service",
    "notes": "service",
    "opening": "service",
    "passage": "service",
    "prefetching": "service",
    "reads": "service",
    "registering": "service",
    "repairs": "service",
    "room": "service",
    "service": "service",
    "spill": "service",
    "store": "service",
    "upkeep": "service",
    "watermarks": "service",
    "wear": "service",
    "window": "service",
    "writes": "service",
    "writing": "service",
    "admin": "edges",
    "check_view": "edges",
    "checks": "edges",
    "claimed": "service",
    "claim_messages": "edges",
    "claim_requests": "edges",
    "claim_routes": "edges",
    "claim_views": "edges",
    "client": "edges",
    "commands": "edges",
    "connection": "edges",
    "daemon": "edges",
    "frames": "edges",
    "layouts": "edges",
    "handout": "edges",
    "inheritance": "edges",
    "hint_admin": "edges",
    "recent_admin": "edges",
    "hint_views": "edges",
    "hint_wire": "edges",
    "message": "edges",
    "metrics": "edges",
    "problems": "edges",
    "ranks": "edges",
    "requests": "edges",
    "calibrations": "edges",
    "reports": "edges",
    "rest": "edges",
    "runs": "edges",
    "server": "edges",
    "tenant_admin": "edges",
    "tenant_views": "edges",
    "views": "edges",
    "wire": "edges",
}

# Where a third-party package may be imported: patterns of paths. What is not here is not imported.
THIRD_PARTY = {
    "aiohttp": (
        "kvstore/admin.py",
        "kvstore/hint_admin.py",
        "kvstore/explain_admin.py",
        "kvstore/recent_admin.py",
        "kvstore/checks.py",
        "kvstore/calibrations.py",
        "kvstore/claim_routes.py",
        "kvstore/problems.py",
        "kvstore/rest.py",
        "kvstore/bypass_admin.py",
        "kvstore/object_routes.py",
        "kvstore/model_admin.py",
        "kvstore/router_admin.py",
        "kvstore/free_admin.py",
        "kvstore/tenant_admin.py",
        "holdfast/cli*",
        "holdfast/rest.py",
    ),
    "flash_attn": ("ring_attention/kernels/flash_attn.py",),
    "matplotlib": ("holdfast/plot_curves.py",),
    "msgspec": ("*",),
    "numpy": ("*",),
    "prometheus_client": ("kvstore/metrics.py", "kvstore/quality_view.py"),
    "pynvml": ("kvstore/gpus.py",),
    "rich": ("holdfast/*",),
    "safetensors": ("ring_attention/*",),
    "structlog": ("kvstore/daemon.py", "holdfast/*"),
    "tokenizers": ("ring_attention/*",),
    "lmcache": ("engine_adapter/lmcache/*",),
    "sglang": ("engine_adapter/sglang/*",),
    "torch": (
        "ring_attention/*",
        "engine_adapter/lmcache/*",
        "engine_adapter/sglang/*",
        "engine_adapter/transformers/*",
        "engine_adapter/vllm/*",
    ),
    "transformers": ("engine_adapter/transformers/*",),
    "typer": ("holdfast/*",),
    "vllm": ("engine_adapter/vllm/*",),
    "xxhash": ("*",),
    "zmq": ("kvstore/event_publisher.py",),
}
# The same for parts of the standard library; an empty tuple means nowhere in the product.
STANDARD_LIBRARY = {
    "random": (),
    "sqlite3": ("kvstore/catalog.py",),
}

# What reads or waits for the time. In kvstore only the clock may.
TIME_NAMES = {"clock_gettime", "monotonic", "perf_counter", "sleep", "time"}
CLOCK = "kvstore/clock.py"

# Handlers that may catch everything: "path::function" -> why nothing narrower will do.
BROAD_HANDLERS: dict[str, str] = {
    "engine_adapter/lmcache/tasks.py::_work": "LMCache would wait for ever for a task that is never done",
    "engine_adapter/vllm/connector.py::_asked": "vLLM ends with its connector, and a cache must not take it down",
    "engine_adapter/vllm/connector.py::register_kv_caches": "the same, at its start: a model that we cannot read",
    "engine_adapter/vllm/lookups.py::_serve": "a thread that died of our bug silently would make every prompt a miss",
    "engine_adapter/vllm/tasks.py::run": "a load that ended by our bug silently would let its request wait for ever",
    "engine_adapter/vllm/errands.py::_serve": "an engine goes on: our bug is logged, and what was asked is a miss",
    "engine_adapter/vllm/transfers.py::_serve": "the same: a transfer that never ends would hang a request",
    "kvstore/mover.py::_serve": "a thread that died of our bug silently would hang every waiter",
    "kvstore/warm.py::_serve": "the same: what it is told would pile up",
    "ring_attention/tokenizer.py::__init__": "the tokenizers library raises bare Exception for a damaged file",
}

FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70


class Import(NamedTuple):
    line: int
    target: str  # dotted and absolute: holdfast.kvstore.layout
    is_relative: bool


def room_of(path: str) -> str:
    return path.split("/", 1)[0]


def package_of(path: str) -> list[str]:
    room, *folders = path.split("/")[:-1]
    return [FRONT_DOOR, *([] if room == FRONT_DOOR else [room]), *folders]


def imports(path: str, source: str) -> Iterator[Import]:
    """Yield what `source` imports, wherever the statement stands, type-checking blocks included.

    `from x import a` yields x.a: only the reader knows whether a is a module or a name in x.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, is_relative=False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            is_relative = node.level > 0
            for alias in node.names:
                yield Import(node.lineno, f"{prefix}.{alias.name}".lstrip("."), is_relative)
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func).split(".")[-1] in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield Import(node.lineno, node.args[0].value, is_relative=False)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def rooms(path: str, source: str) -> Iterator[str]:
    here = room_of(path)
    for found in imports(path, source):
        first, second, *_ = [*found.target.split("."), ""]
        if not found.is_relative:
            if first in ROOMS:
                yield f"{path}:{found.line}: {found.target} is not imported relatively"
        elif first != FRONT_DOOR:
            yield f"{path}:{found.line}: a relative import leaves the package"
        else:
            there = second if second in ROOMS else FRONT_DOOR
            if there not in {here, *ROOMS[here]}:
                yield f"{path}:{found.line}: {here} imports {there}"


def module_in_kvstore(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def floors(path: str, source: str) -> Iterator[str]:
    if room_of(path) != "kvstore":
        return
    here = module_in_kvstore(path)
    if here == "__init__":  # The room's own door stands on the top floor.
        return
    if here not in FLOOR_OF:
        yield f"{path}: has no floor; add {here!r} to FLOOR_OF in tests/test_layering.py"
        return
    for found in imports(path, source):
        if not found.target.startswith("holdfast.kvstore."):
            continue
        there = found.target.split(".")[2]
        if there not in FLOOR_OF:
            yield f"{path}:{found.line}: {there!r} is no module of FLOOR_OF; import from a module"
        elif FLOORS.index(FLOOR_OF[there]) > FLOORS.index(FLOOR_OF[here]):
            ours, theirs = FLOOR_OF[here], FLOOR_OF[there]
            yield f"{path}:{found.line}: {here} ({ours}) imports {there} ({theirs})"
        elif (FLOOR_OF[here], FLOOR_OF[there]) in APART:
            yield f"{path}:{found.line}: {here} (service) imports {there} (effects); hand out an order"


def leaves(path: str, source: str) -> Iterator[str]:
    table = THIRD_PARTY | STANDARD_LIBRARY
    for found in imports(path, source):
        name = found.target.split(".")[0]
        if found.is_relative or name in ROOMS or name == "":
            continue
        if name in table:
            if not any(fnmatch(path, pattern) for pattern in table[name]):
                allowed = ", ".join(table[name]) or "nowhere"
                yield f"{path}:{found.line}: imports {name}; allowed: {allowed}"
        elif name not in sys.stdlib_module_names:
            yield (f"{path}:{found.line}: imports {name}, which THIRD_PARTY in tests/test_layering.py does not list")


def clocks(path: str, source: str) -> Iterator[str]:
    if room_of(path) != "kvstore" or path == CLOCK:
        return
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "time"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) in aliases:
            if node.attr.removesuffix("_ns") in TIME_NAMES:
                yield f"{path}:{node.lineno}: time.{node.attr}; take the clock as an argument"
        elif isinstance(node, ast.ImportFrom) and node.module == "time" and not node.level:
            for alias in node.names:
                if alias.name.removesuffix("_ns") in TIME_NAMES | {"*"}:
                    yield f"{path}:{node.lineno}: time.{alias.name}; take the clock as an argument"


def broad_handlers(path: str, source: str) -> Iterator[tuple[str, int]]:
    """Yield ("path::function", line) of what catches or suppresses everything."""
    broad = {"Exception", "BaseException", "builtins.Exception", "builtins.BaseException"}

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            inner = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = child.name
            caught: list[ast.expr] | None = None
            if isinstance(child, ast.ExceptHandler):
                kinds = child.type
                caught = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds] if kinds else None
                if kinds is None:
                    yield f"{path}::{inner}", child.lineno
            elif isinstance(child, ast.Call) and dotted(child.func).split(".")[-1] == "suppress":
                caught = child.args
            if any(dotted(kind) in broad for kind in caught or ()):
                yield f"{path}::{inner}", child.lineno
            yield from visit(child, inner)

    yield from visit(ast.parse(source), "<module>")


def handlers(path: str, source: str) -> Iterator[str]:
    for place, line in broad_handlers(path, source):
        if place not in BROAD_HANDLERS:
            yield f"{path}:{line}: catches everything; name the errors ({place} is not allowed to)"


def sizes(path: str, source: str) -> Iterator[str]:
    line_count = len(source.splitlines())
    if line_count > FILE_LINES_MAX:
        yield f"{path}: {line_count} lines, more than {FILE_LINES_MAX}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                limit = f"more than {FUNCTION_LINES_MAX}"
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, {limit}"


Rule = Callable[[str, str], Iterator[str]]
RULES: tuple[Rule, ...] = (rooms, floors, leaves, clocks, handlers, sizes)


def product() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    }


def test_the_table_of_floors_names_every_module_on_its_floor():
    """A newcomer looks there, so a new module is entered there."""
    rows = dict.fromkeys(FLOORS, "")
    for line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1] in rows:
            rows[cells[1]] = cells[2]
    for floor in FLOORS:
        here = {module for module, where in FLOOR_OF.items() if where == floor}
        assert set(re.findall(r"\w+", rows[floor])) == here, floor


def ring_rows() -> dict[str, int]:
    """The row of each module of ring_attention in ARCHITECTURE.md's table of that room."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    lines = text[text.index("Inside `ring_attention/`") :].split("\n\n")[1].splitlines()[2:]
    return {module: row for row, line in enumerate(lines) for module in re.findall(r"\w+", line.split("|")[2])}


def test_the_rows_of_ring_attention_use_only_rows_above():
    rows = ring_rows()
    room = ROOT / "ring_attention"
    here = {path.stem for path in room.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rows) == here - {"__init__"}
    for module in set(rows) - {"kernels"}:
        for node in ast.walk(ast.parse((room / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                used = node.module.partition(".")[0]
                assert rows[used] <= rows[module], f"{module} uses {used}, which stands below it"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_in_order(rule):
    found = [problem for path, source in product().items() for problem in rule(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_the_whole_house_is_read():
    assert {f"{room}/__init__.py" for room in ROOMS} <= set(product())


def test_no_permission_outlives_its_handler():
    places = {place for path, source in product().items() for place, _ in broad_handlers(path, source)}
    assert set(BROAD_HANDLERS) <= places


def test_every_listed_floor_exists():
    assert set(FLOOR_OF.values()) == set(FLOORS)


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX
LONG_FILE = "x = 1\n" * (FILE_LINES_MAX + 1)
PLANTED = [
    (rooms, "eviction/a.py", "from ..kvstore.layout import Layout", "eviction imports kvstore"),
    (rooms, "eviction/a.py", "from .. import kvstore", "eviction imports kvstore"),
    (rooms, "kvstore/a.py", "from ..ring_attention import x", "kvstore imports ring_attention"),
    (rooms, "kvstore/sub/a.py", "from ...engine_adapter.x import y", "imports engine_adapter"),
    (rooms, "kvstore/a.py", "from .. import __version__", "kvstore imports holdfast"),
    (rooms, "kvstore/a.py", "from ..cli import main", "kvstore imports holdfast"),
    (rooms, "ring_attention/a.py", "from ..eviction import x", "ring_attention imports eviction"),
    (rooms, "ring_attention/a.py", "from ..engine_adapter import x", "imports engine_adapter"),
    (rooms, "engine_adapter/a.py", "from ..eviction import x", "engine_adapter imports eviction"),
    (rooms, "kvstore/a.py", "def f():\n    from ..cli import main", "kvstore imports holdfast"),
    (rooms, "kvstore/a.py", "if TYPE_CHECKING:\n    from ..cli import m", "imports holdfast"),
    (rooms, "kvstore/a.py", "import holdfast.kvstore.layout", "not imported relatively"),
    (rooms, "kvstore/a.py", "from holdfast.kvstore import layout", "not imported relatively"),
    (rooms, "holdfast/a.py", "from kvstore.layout import Layout", "not imported relatively"),
    (rooms, "holdfast/a.py", "import_module('holdfast.kvstore')", "not imported relatively"),
    (rooms, "kvstore/a.py", "from ...kvstore import x", "leaves the package"),
    (floors, "kvstore/layout.py", "from .ledger import x", "layout (nouns) imports ledger (rules)"),
    (floors, "kvstore/layout.py", "from . import ledger", "layout (nouns) imports ledger (rules)"),
    (floors, "kvstore/planner.py", "from .arena import x", "(rules) imports arena (effects)"),
    (floors, "kvstore/mover.py", "from .service import x", "(effects) imports service (service)"),
    (floors, "kvstore/mover.py", "from ..kvstore.service import x", "imports service (service)"),
    (floors, "kvstore/service.py", "from . import Layout", "'Layout' is no module of FLOOR_OF"),
    (floors, "kvstore/novelty.py", "", "add 'novelty' to FLOOR_OF in tests/test_layering.py"),
    (floors, "kvstore/novelty/a.py", "", "add 'novelty' to FLOOR_OF in tests/test_layering.py"),
    (leaves, "kvstore/arena.py", "import torch", "imports torch; allowed: ring_attention/*"),
    (leaves, "engine_adapter/a.py", "from torch.nn import x", "imports torch"),
    (leaves, "kvstore/arena.py", "importlib.import_module('torch.nn')", "imports torch"),
    (leaves, "kvstore/a.py", "from safetensors import x", "imports safetensors"),
    (leaves, "holdfast/cli.py", "import tokenizers", "imports tokenizers"),
    (leaves, "kvstore/client.py", "import aiohttp", "imports aiohttp"),
    (leaves, "holdfast/demo.py", "from aiohttp import web", "imports aiohttp"),
    (
        leaves,
        "kvstore/service.py",
        "import sqlite3",
        "imports sqlite3; allowed: kvstore/catalog.py",
    ),
    (leaves, "kvstore/admin.py", "import typer", "imports typer"),
    (leaves, "kvstore/admin.py", "import rich.table", "imports rich"),
    (leaves, "kvstore/service.py", "import prometheus_client", "imports prometheus_client"),
    (leaves, "kvstore/service.py", "import structlog", "imports structlog"),
    (leaves, "eviction/a.py", "from random import Random", "imports random; allowed: nowhere"),
    (leaves, "kvstore/a.py", "import requests", "imports requests, which THIRD_PARTY"),
    (clocks, "kvstore/service.py", "import time\ntime.monotonic_ns()", ":2: time.monotonic_ns"),
    (clocks, "kvstore/service.py", "import time as t\nt.sleep(1)", ":2: time.sleep"),
    (clocks, "kvstore/service.py", "import time\ndef f(now=time.time): ...", ":2: time.time"),
    (clocks, "kvstore/service.py", "from time import perf_counter", ":1: time.perf_counter"),
    (handlers, "kvstore/a.py", "try: f()\nexcept Exception: ...", ":2: catches everything"),
    (handlers, "kvstore/a.py", "try: f()\nexcept: ...", ":2: catches everything"),
    (handlers, "kvstore/a.py", "try: f()\nexcept (OSError, BaseException): ...", ":2: catches"),
    (handlers, "kvstore/a.py", "with contextlib.suppress(Exception): f()", ":1: catches"),
    (handlers, "kvstore/a.py", "def f():\n  try: g()\n  except Exception: ...", "a.py::f is not"),
    (sizes, "kvstore/a.py", LONG_FUNCTION, "f has 71 lines"),
    (
        sizes,
        "kvstore/a.py",
        f"class A:\n{textwrap.indent(LONG_FUNCTION, '    ')}",
        "f has 71 lines",
    ),
    (sizes, "kvstore/a.py", LONG_FILE, "451 lines"),
]


@pytest.mark.parametrize(("rule", "path", "source", "message"), PLANTED)
def test_a_planted_violation_is_found(rule, path, source, message):
    found = list(rule(path, source))
    assert len(found) == 1, found
    assert found[0].startswith(path)
    assert message in found[0]


ALLOWED = [
    ("eviction/a.py", "import heapq\nfrom .b import c\nfrom . import d"),
    ("kvstore/service.py", "from ..eviction.scores import x\nfrom .orders import y\nimport numpy"),
    ("kvstore/planner.py", "from . import ledger, layout\nfrom .residency import x"),
    ("kvstore/__init__.py", "from .client import Client"),
    ("ring_attention/a.py", "import torch.nn\nfrom ..kvstore.layout import Layout"),
    ("engine_adapter/a.py", "from ..kvstore.client import Client\nfrom ..ring_attention import x"),
    ("holdfast/__init__.py", "from .kvstore.client import Client\nfrom .engine_adapter import x"),
    ("holdfast/cli.py", "import typer, rich, structlog, aiohttp\nfrom . import __version__"),
    ("holdfast/cli_top.py", "import aiohttp, time\ntime.sleep(1)"),
    ("kvstore/catalog.py", "import sqlite3"),
    ("kvstore/clock.py", "import time\ntime.monotonic_ns()"),
    ("kvstore/service.py", "import time\ntime.strftime('%Y')\nself.time.time()\nclock.sleep(1)"),
    ("kvstore/service.py", "try: f()\nexcept (OSError, ValueError): ..."),
    ("kvstore/service.py", "x = 1\n" * FILE_LINES_MAX),
    ("kvstore/service.py", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES_MAX - 1)),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_passes(path, source):
    assert [problem for rule in RULES for problem in rule(path, source)] == []
