"""Tests against real engines: tests/engines/<engine>/ needs <engine> importable, as `make test-engines` runs it.

Without the engine a module there is one skip with a reason; it is not imported, so it may import its engine at the top.
HOLDFAST_REQUIRE_ENGINES=1 makes that a failure.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEST_SECONDS = 600
ENGINES = ("lmcache", "sglang", "vllm")


def absent(what: str) -> None:
    """Skip what needs it, or fail where engines are required."""
    reason = f"{what} is not there: run `make test-engines`"
    if os.environ.get("HOLDFAST_REQUIRE_ENGINES") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def pytest_configure(config):
    """Engines warn of what is theirs: where one is installed, only warnings of ours are errors."""
    if any(importlib.util.find_spec(engine) for engine in ENGINES):
        config.addinivalue_line("filterwarnings", "default")
        config.addinivalue_line("filterwarnings", "error:::holdfast")


def pytest_collection_modifyitems(items):
    """An engine takes 10 s to start on a quiet machine, and minutes on a busy one."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


class WithoutEngine(pytest.Module):
    """A module of tests that is not imported, for want of its engine."""

    engine = ""

    def collect(self):
        absent(self.engine)
        return []


def pytest_pycollect_makemodule(module_path, parent):
    engine = module_path.relative_to(HERE).parts[0]
    if engine in ENGINES and importlib.util.find_spec(engine) is None:
        module = WithoutEngine.from_parent(parent, path=module_path)
        module.engine = engine
        return module
    return None


def python_of(engine: str) -> Path:
    found = Path(os.environ.get(f"HOLDFAST_{engine.upper()}_PYTHON", ROOT / f".venv-{engine}" / "bin" / "python"))
    if not found.exists():
        absent(f"{engine}'s environment")
    return found


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter that has vLLM, for processes of their own."""
    return python_of("vllm")


@pytest.fixture(scope="session")
def lmcache_python() -> Path:
    """The interpreter that has LMCache's server."""
    return python_of("lmcache")
