"""Claim tables: pins and leases as the command line shows them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .cli_tables import Json, duration, size, table


def pins(found: Sequence[Json]) -> Table:
    """Pins: who, why, how long and how much."""
    columns = ("DOCUMENT", "TIER", "KIND", "STRENGTH", "SIZE", "LEFT", "REFRESH", "OWNER", "REASON")
    rows = (
        (
            f"{p['tenant']}/{p['document']}",
            p["tier"],
            p["kind"],
            f"{p['strength']:.0%}" if p["kind"] == "soft" else "-",
            size(p["size_bytes"]),
            "for ever" if p["remaining_seconds"] is None else duration(p["remaining_seconds"]),
            p["refresh"],
            p["owner"],
            p["reason"],
        )
        for p in found
    )
    return table(columns, rows, numbers=("STRENGTH", "SIZE", "LEFT"))


def pin_budgets(found: Json) -> str:
    """What all pins take of their budgets."""
    parts = [("on all tiers", found["pinned_bytes"], found["budget_bytes"])]
    parts.append(("in ddr", found["ddr_pinned_bytes"], found["ddr_budget_bytes"]))
    return "pinned: " + ", ".join(
        size(used) + ("" if limit is None else f" of {size(limit)}") + f" {what}" for what, used, limit in parts
    )


def leases(found: Sequence[Json]) -> Table:
    """Leases: who, what, how long and how much."""
    columns = ("DOCUMENT", "TIER", "SIZE", "CLIENT", "PID", "AGE", "OVERDUE BY")
    rows = (
        (
            f"{lease['tenant']}/{lease['document']}",
            lease["tier"],
            size(lease["size_bytes"]),
            lease["client"],
            "-" if lease["pid"] is None else lease["pid"],
            duration(lease["age_seconds"]),
            duration(-lease["remaining_seconds"]) if lease["overdue"] else "-",
        )
        for lease in found
    )
    return table(columns, rows, numbers=("SIZE", "PID", "AGE", "OVERDUE BY"))
