"""The environment is the one that was pinned, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import vllm

from engine_environments import installed, pinned


def test_the_environment_holds_exactly_what_is_pinned():
    assert Path(vllm.__file__).is_relative_to(sys.prefix)
    assert installed() == pinned("vllm")
