"""`holdfast explain`: why a document is where it is, what of it is gone and why, and what to do; `holdfast tiers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import typer

from .cli_session import Name, session_of, split

if TYPE_CHECKING:
    from rich.console import RenderableType

Json = dict[str, Any]
LINE_COLUMNS: Final = 100


def explain(ctx: typer.Context, name: Name) -> None:
    """Why a document is where it is, or no more; what bringing it back costs, and how to keep it."""
    from .rest import document_path

    session = session_of(ctx)
    found = session.rest().get(f"/v1/documents/{document_path(*split(name))}/explain")

    def human() -> list[RenderableType]:
        parts: list[RenderableType] = []
        if found["caches"]:
            parts += [_caches(found["caches"]), *_scores(found["caches"], "device"), ""]
        if found["departures"]:
            parts += [_departures(found["departures"]), *_scores(found["departures"][:1], "tier"), ""]
        return [*parts, *sentences(found)]

    session.show(found, human)


def tiers(ctx: typer.Context) -> None:
    """What each device holds, and how good evictions were."""
    session = session_of(ctx)
    found = session.rest().get("/v1/tiers")

    def human() -> list[RenderableType]:
        from . import cli_tables

        return [cli_tables.tiers(found["tiers"]), "", quality(found["quality"])]

    session.show(found, human)


def quality(found: Sequence[Json]) -> RenderableType:
    """What became of what the policy evicted."""
    from .cli_tables import duration, table

    columns = ("TIER", "EVICTED", "UNFETCHED", "IDLE BEFORE", "CAME BACK", "AFTER", "REGRET")
    rows = (
        (
            one["tier"],
            one["evicted"],
            one["unfetched"],
            duration(one["idle_seconds"]),
            one["returned"],
            duration(one["gap_seconds"]),
            duration(one["regret_seconds"]),
        )
        for one in found
    )
    return table(columns, rows, numbers=columns[1:])


def _caches(found: Sequence[Json]) -> RenderableType:
    from .cli_tables import duration, size, table

    columns = ("DEVICE", "HOLDS", "EXTENTS", "KEPT BY", "LEAVES FIRST", "IN LINE", "COSTS")
    rows = (
        (
            one["device"],
            size(one["size_bytes"]),
            one["extents"],
            ", ".join(_keepers(one)) or "-",
            f"[{one['start']}, {one['stop']})",
            _place(one["standing"]),
            duration(one["restore_seconds"]),
        )
        for one in found
    )
    return table(columns, rows, numbers=("HOLDS", "EXTENTS", "COSTS"))


def _place(standing: Json | None) -> str:
    if standing is None:
        return "-"
    return f"{standing['ahead']} of {standing['in_line']} before it" if standing["is_movable"] else "stays"


def _scores(found: Sequence[Json], where: str) -> Iterator[str]:
    """What the scores are made of, but for the sum that a learned policy's logit is: --json has that."""
    from textwrap import wrap

    from .cli_tables import plain

    for one in found:
        parts = [f"{key}={value:.3g}" for key, value in one["scores"].items() if not key.startswith("logit_")]
        if parts:
            said = plain(f"{one[where]}, by {one['policy']}: {' '.join(parts)}")
            yield from wrap(said, LINE_COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def _keepers(cache: Json) -> Iterator[str]:
    if cache["leases"]:
        yield "a lease" if cache["leases"] == 1 else f"{cache['leases']} leases"
    if cache["pin"]:
        yield f"a {cache['pin']} pin"
    if cache["is_hinted"]:
        yield "queries that are announced"
    if cache["is_guaranteed"]:
        yield "its tenant's guarantee"


def _departures(found: Sequence[Json]) -> RenderableType:
    from .cli_tables import duration, moment, score, size, table

    columns = ("LEFT", "TIER", "TOKENS", "SIZE", "WHY", "FOR", "ACTION", "BACK", "COST THEN", "SCORE")
    rows = (
        (
            moment(one["wall_ns"]),
            one["tier"],
            f"[{one['start']}, {one['stop']})",
            size(one["size_bytes"]),
            one["reason"],
            one["wanted_by"] or "-",
            one["action"],
            "yes" if one["is_back"] else "no",
            duration(one["restore_seconds"]),
            score(one["scores"]),
        )
        for one in found
    )
    return table(columns, rows, numbers=("SIZE", "COST THEN", "SCORE"))


# Sentences -------------------------------------------------------------------------------------


def sentences(found: Json) -> Iterator[str]:
    """What it comes to, and what to do about it."""
    from .cli_tables import duration, moment, plain, size

    name, restore = plain(f"{found['tenant']}/{found['name']}"), found["restore"]
    if found["ended_wall_ns"] is not None:
        yield f"{name} is {found['state']} since {moment(found['ended_wall_ns'])}."
        yield (
            f"To have its {found['token_count']} tokens back, ingest it again: computing them takes "
            f"{duration(restore['recompute_seconds'])}, less where others share its front."
        )
        return
    if found["expires_wall_ns"] is not None:
        when = moment(found["expires_wall_ns"])
        overdue = f"{name} was to end {when}: it is deleted as soon as its leases and pins have ended."
        yield overdue if found["is_overdue"] else f"{name} ends {when}."
    for cache in found["caches"]:
        yield _in_line(name, cache)
    if restore["missing_tokens"]:
        yield _missing(name, found)
    if restore["nvme_bytes"]:
        yield (
            f"An attach of {name} reads {size(restore['nvme_bytes'])} from nvme: "
            f"{duration(restore['reload_seconds'])}. `holdfast prefetch {name}` does that before it is asked for."
        )


def _in_line(name: str, cache: Json) -> str:
    place, device = cache["standing"], cache["device"]
    by = "LRU, which the guard follows for now" if cache["follows_lru"] else cache["policy"]
    if place is None or not place["is_movable"]:
        why = ", ".join(_keepers(cache)) or "a move that is under way"
        return f"{name} stays in {device}: kept by {why}."
    before = f"{place['ahead']} of {place['in_line']} would leave {device} before {name}"
    said = f"{before if place['ahead'] else f'{name} is next to leave {device}'}, by {by}."
    if not place["is_leaf"]:
        said = f"Others continue {name} in {device}, and have to leave before it."
    if cache["is_guaranteed"]:
        return f"{said} Its tenant's guarantee keeps other tenants from it."
    if place["ahead"] > place["in_line"] // 4 or not place["is_leaf"] or cache["pin"]:
        return said
    return f"{said} To keep it: `holdfast pin {name} --tier {cache['tier']}`, or raise {cache['bound']}."


def _missing(name: str, found: Json) -> str:
    from .cli_tables import duration, moment, plain

    restore = found["restore"]
    missing = ", ".join(f"[{start}, {stop})" for start, stop in restore["missing_tokens"])
    said = f"Tokens {missing} of {name} are gone. "
    last = next((one for one in found["departures"] if one["action"] == "drop" and not one["is_back"]), None)
    if last is not None:
        wanted = f" for {plain(last['wanted_by'])}" if last["wanted_by"] else ""
        said += f"They left {last['tier']} last, {moment(last['wall_ns'])}: {plain(last['reason'])}{wanted}. "
    said += f"To have them back, ingest it again: computing them takes {duration(restore['recompute_seconds'])}. "
    if last is not None and "not written" in last["reason"]:
        return said + "To have it written to nvme next time: ingest it with the write policy write-through."
    return said + f"To keep it next time: `holdfast pin {name} --tier nvme`, or raise {restore['bound']}."
