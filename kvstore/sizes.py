"""Sizes: bytes as people write them.

"64 MiB" is 2^26, "20 GB" is 20e9. Bare letters ("64M") are refused, for half of the world reads them as 2^20 and the
other half as 10^6.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": TIB,
}


def parse_size(value: object) -> int:
    """Bytes of an integer or a string such as "64 MiB"; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", str(value).strip())
    if not isinstance(value, str) or matched is None:
        raise ValueError("not a size")
    number, unit = matched.groups()
    if unit and unit not in UNITS:
        raise ValueError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
    size_bytes = Decimal(number) * UNITS[unit or "B"]
    if size_bytes != int(size_bytes):
        raise ValueError("not a whole number of bytes")
    return int(size_bytes)


def format_size(size_bytes: int) -> str:
    """The exact spelling with the smallest number: 64 MiB, 20 GB, 1001 B."""
    whole = [(size_bytes // size, unit) for unit, size in UNITS.items() if not size_bytes % size]
    number, unit = min(whole, key=lambda pair: pair[0]) if size_bytes else (0, "B")
    return f"{number} {unit}"


def about_size(size_bytes: int) -> str:
    """For people who compare: one decimal of the largest binary unit."""
    unit, name = next(((u, n) for u, n in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB")) if size_bytes >= u), (KIB, "KiB"))
    return f"{size_bytes / unit:.1f} {name}"
