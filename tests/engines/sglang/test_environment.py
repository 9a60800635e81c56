"""The unpacked wheel is the one that was pinned."""

from __future__ import annotations

from importlib.metadata import version

from engine_environments import pinned


def test_the_wheel_is_the_pinned_one():
    assert {"sglang": version("sglang")} == pinned("sglang")
