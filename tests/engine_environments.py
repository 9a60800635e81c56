"""What deploy/engines/ pins, and what an environment has."""

from __future__ import annotations

import sysconfig
from importlib.metadata import distributions
from pathlib import Path

PINS = Path(__file__).resolve().parent.parent / "deploy" / "engines"


def pinned(engine: str) -> dict[str, str]:
    """Versions by name, as `engine`'s requirement file has them."""
    lines = (PINS / f"{engine}.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))


def installed() -> dict[str, str]:
    """Versions by name, without local parts, pip and Holdfast."""
    here = distributions(path=[sysconfig.get_path("purelib")])  # setuptools adds what it vendors to sys.path
    found = {one.name.lower().replace("_", "-"): one.version.partition("+")[0] for one in here}
    return {name: version for name, version in found.items() if name not in {"pip", "holdfast"}}
