"""Tables: what the command line shows to people, made of what the admin API answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]
UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
PIPE_COLUMNS: Final = 1000  # nobody reads a pipe by its width, so nothing is folded there
NS: Final = 1_000_000_000


def console(*, color: bool) -> Console:
    """Standard output as it is now."""
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    return Console(no_color=not color, highlight=False, markup=False, emoji=False, width=width)


def plain(value: object) -> str:
    """Text that cannot command a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def size(size_bytes: int) -> str:
    """1536 -> 1.5 KiB. Exact below 1 KiB, three figures above."""
    value, unit = float(size_bytes), UNITS[0]
    for unit in UNITS:
        if abs(value) < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def duration(seconds: float | None) -> str:
    """A duration with the unit that suits it; "-" for none."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0 s"
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if abs(seconds) < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def nanoseconds(value: float | None) -> str:
    """A duration given in nanoseconds."""
    return duration(None if value is None else value / NS)


def speed(bytes_per_second: float) -> str:
    """In GB/s, as disks and buses are sold."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def calibration(found: Json) -> list[Any]:
    """A calibration, what predictions use by now, and how far they were off."""
    measured = found["calibration"]
    links = {link["hop"]: link for link in found.get("links", ())}
    table = Table(box=None, header_style="bold")
    for column, side in (
        ("", "left"),
        ("MEDIAN", "right"),
        ("SLOWEST", "right"),
        ("FASTEST", "right"),
        ("LATENCY", "right"),
        ("PREDICTED NOW", "right"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for rate in measured["rates"]:
        link = links.get(rate["name"])
        speeds = [speed(rate[key]) for key in ("bytes_per_second", "slowest", "fastest")]
        now = speed(link["bytes_per_second"]) if link else "-"
        table.add_row(plain(rate["name"]), *speeds, nanoseconds(rate["latency_ns"]), now)
    said: list[Any] = [f"measured {moment(measured['measured_wall_ns'])} on {plain(measured['machine'])}", table]
    said += [_gpu(gpu) for gpu in measured["gpus"]]
    said += [f"unknown: {plain(reason)}" for reason in measured["unknown"]]
    prediction = found.get("prediction")
    if prediction and prediction["swaps"]:
        off = ", ".join(
            f"{name} {100 * prediction[key]:.0f} %" for name, key in (("median", "median_error"), ("p90", "p90_error"))
        )
        said.append(f"predictions of the last {prediction['swaps']} swaps were off by: {off}")
    return said


def rings(found: Sequence[Json]) -> Table:
    """What groups of ranks were measured to do, and from how many new tokens on they pass KV and not queries."""
    cached = [tokens for tokens, _ in found[0]["pass_kv_from"]]
    columns = ("GROUP", "HEADS", "COMPUTE", "LINK", "LATENCY", "EXCHANGE", "OVERLAP", "NOISE")
    thresholds = tuple(f"PASS-KV FROM (P={tokens >> 10}K)" for tokens in cached)
    rows = []
    for rate in found:
        setting, speeds, turns = rate["setting"], rate["speed"], dict(rate["pass_kv_from"])
        means = ", ".join(setting[what] for what in ("communicator", "kernel", "device"))
        rows.append(
            (
                f"cp={setting['cp']} tp={setting['tp']} {means}",
                f"{setting['heads']}/{setting['kv_heads']} x {setting['head_dim']} {setting['dtype']}",
                f"{speeds['flops_per_second'] / 1e9:.4g} GFLOP/s",
                speed(speeds["bytes_per_second"]),
                nanoseconds(speeds["latency_ns"]),
                speed(speeds["exchange_bytes_per_second"]),
                f"{speeds['overlap']:.0%}",
                f"{speeds['spread']:.0%}",
                *("never" if turns.get(tokens) is None else f"T={turns[tokens]}" for tokens in cached),
                moment(rate["measured_wall_ns"]),
                setting["machine"],
            )
        )
    return table((*columns, *thresholds, "MEASURED", "ON"), rows, numbers=(*columns[2:], *thresholds))


def prefills(found: Sequence[tuple[int, int, float]]) -> Table:
    """What prefills took."""
    rows = ((cached, new, duration(seconds), f"{new / seconds:.0f}") for cached, new, seconds in found)
    columns = ("CACHED", "NEW", "TOOK", "TOKENS/S")
    return table(columns, rows, numbers=columns)


def _gpu(gpu: Json) -> str:
    def known(value: object, text: str) -> str:
        return text if value is not None else "unknown"

    memory = known(gpu["hbm_bytes"], f"{size(gpu['hbm_free_bytes'] or 0)} free of {size(gpu['hbm_bytes'] or 0)}")
    bus = known(gpu["pcie_generation"], f"gen {gpu['pcie_generation']} x{gpu['pcie_width']}")
    links = known(gpu["nvlinks"], f"{gpu['nvlinks']} links up")
    return f"GPU {gpu['index']}: {plain(gpu['name'])}, HBM {memory}, PCIe {bus}, NVLink {links}"


def moment(wall_ns: int | None) -> str:
    """A time in UTC; "never" for none."""
    if wall_ns is None:
        return "never"
    return datetime.fromtimestamp(wall_ns / NS, tz=UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> Table:
    """Plain columns; those in `numbers` stand to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def pairs(rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), Text(plain(value)))
    return made


def documents(found: Sequence[Json]) -> Table:
    """Documents, one a line."""
    columns = ("DOCUMENT", "TOKENS", "SIZE", "HBM", "DDR", "NVME", "STATE", "PIN", "LEASES", "RESTORE")
    rows = (
        (
            f"{d['tenant']}/{d['name']}",
            d["token_count"],
            size(d["size_bytes"]),
            *(size(here) if (here := d["resident_bytes"].get(tier)) else "-" for tier in ("hbm", "ddr", "nvme")),
            state(d),
            _pin(d["pin"]),
            d["leases"],
            duration(d["restore_seconds"]),
        )
        for d in found
    )
    return table(columns, rows, numbers=("TOKENS", "SIZE", "HBM", "DDR", "NVME", "LEASES", "RESTORE"))


def _pin(pin: Json | None) -> str:
    return "-" if pin is None else pin["tier"] if pin["kind"] == "hard" else f"{pin['tier']}, soft"


def state(document: Json) -> str:
    """A document's state in a word or two."""
    if not document["complete"]:
        missing = sum(stop - start for start, stop in document["missing_tokens"])
        return f"{missing} tokens gone"
    return "durable" if document["durable"] else "in memory"


def document(d: Json) -> Table:
    """One document."""
    pin = d["pin"]
    pinned = f"{_pin(pin)} until {moment(pin['expires_wall_ns'])}, {pin['owner']}: {pin['reason']}" if pin else "-"
    resident = ", ".join(f"{size(held)} in {tier}" for tier, held in d["resident_bytes"].items()) or "nowhere"
    gone = ", ".join(f"[{start}, {stop})" for start, stop in d["missing_tokens"]) or "none"
    used = d["last_access_seconds_ago"]
    return pairs(
        (
            ("document", f"{d['tenant']}/{d['name']}"),
            ("model", d["model"]),
            ("page format", d["page_format"] or "canonical"),
            ("tokens", d["token_count"]),
            ("size", f"{size(d['size_bytes'])} in {d['extent_count']} extent{'s' * (d['extent_count'] != 1)}"),
            ("resident", resident),
            ("state", state(d)),
            ("tokens gone", gone),
            ("write policy", f"{d['write_policy']} ({d['write_reason']})"),
            ("created", moment(d["created_wall_ns"])),
            ("ends", moment(d["expires_wall_ns"])),
            ("last used", f"{duration(used)} ago" if used is not None else "unknown"),
            ("uses", d["use_count"]),
            ("to restore", duration(d["restore_seconds"])),
            ("leases", d["leases"]),
            ("pin", pinned),
        )
    )


def extents(found: Sequence[Json]) -> Table:
    """A document's extents."""
    rows = (
        (
            f"[{e['start']}, {e['stop']})",
            size(e["size_bytes"]),
            ", ".join(f"{device} {phase}" for device, phase in e["copies"].items()) or "gone",
            standing(e["standing"]),
            score(e["scores"]),
        )
        for e in found
    )
    return table(("TOKENS", "SIZE", "COPIES", "TO LEAVE", "SCORE"), rows, numbers=("SIZE", "SCORE"))


def standing(s: Json | None) -> str:
    """Where it is in line: how many leave before it, of how many; in which class, if not the ordinary one."""
    if s is None:
        return "-"
    if not s["is_movable"]:
        return f"stays in {s['tier']}"
    behind = "" if s["is_leaf"] else ", behind its followers"
    shielded = ", softly pinned" if s["rank"] else ""
    return f"{s['tier']}: {s['ahead']} of {s['in_line']} before it{behind}{shielded}"


def score(parts: Json) -> str:
    """What the parts come to. `holdfast explain` and --json have the parts."""
    return f"{parts['score']:.3g}" if parts.get("score") is not None else "-"


def tiers(found: Sequence[Json]) -> Table:
    """Every device."""
    columns = ("DEVICE", "USED", "CAPACITY", "FULL", "IN USE", "PINNED", "SPLIT", "WITHDRAWN", "WRITTEN", "AMPLIFIED")
    rows = (
        (
            t["device"],
            size(t["used_bytes"]),
            size(t["capacity_bytes"]),
            f"{t['used_bytes'] / t['capacity_bytes']:.0%}" if t["capacity_bytes"] else "-",
            size(t["leased_bytes"]),
            size(t["pinned_bytes"]),
            size(t["fragmented_bytes"]),
            size(t["withdrawn_bytes"]),
            size(sum(t["written_bytes"].values())),
            f"{t['write_amplification']:.2f}" if t["write_amplification"] is not None else "-",
        )
        for t in found
    )
    return table(columns, rows, numbers=columns[1:])


def status(s: Json) -> Table:
    """The daemon at a glance."""
    overdue = f" ({s['leases_overdue']} overdue)" if s["leases_overdue"] else ""
    return pairs(
        (
            ("daemon", f"{s['version']} at {s['url']}"),
            ("ready", "yes" if s["not_ready"] is None else f"no: {s['not_ready']}"),
            *((("bypassed", "yes: engines go on without the cache; see `holdfast bypass`"),) if s["bypassed"] else ()),
            ("documents", s["documents"]),
            ("leases", f"{s['leases']}{overdue}"),
            ("pins", f"{s['pins']}, {size(s['pinned_bytes'])} of {size(s['pin_budget_bytes'])}"),
            *(("group", group(g)) for g in s["groups"]),
            *((("groups", "none"),) if not s["groups"] else ()),
            ("waiting", f"{s['reservations_waiting']} for room, {s['writes_queued']} to be written"),
            ("in flight", f"{s['orders_in_flight']} orders"),
            ("queries", _amortised(s)),
            ("relieving", ", ".join(s["relieving"]) or "no tier"),
            ("ddr", s["ddr_backing"]),
        )
    )


def _amortised(s: Json) -> str:
    each = "" if s["amortisation"] is None else f", {s['amortisation']:.3g} for each"
    return f"{s['queries_answered']} answered, KV was brought near {s['reattaches']} times{each}"


def group(g: Json) -> str:
    """A group of ranks, and what they compute with."""
    ranks = f"{g['name']}: {g['ranks_registered']}/{g['cp'] * g['tp']} ranks (cp={g['cp']} tp={g['tp']})"
    return ", ".join([ranks, *(f"{what} {g[what]}" for what in ("device", "kernel", "communicator") if g[what])])


def victims(found: Sequence[Json]) -> Table:
    """What leaves, or would."""
    columns = ("DOCUMENTS", "TOKENS", "TIER", "ACTION", "SIZE", "RESTORE", "SCORE")
    rows = (
        (
            ", ".join(v["documents"]),
            f"[{v['start']}, {v['stop']})",
            v["tier"],
            v["action"],
            size(v["size_bytes"]),
            nanoseconds(v["restore_ns"]),
            score(v["scores"]),
        )
        for v in found
    )
    return table(columns, rows, numbers=("SIZE", "RESTORE", "SCORE"))


def verdicts(found: Sequence[Json]) -> Table:
    """What left and why."""
    columns = ("WHEN", "DOCUMENTS", "TOKENS", "TIER", "ACTION", "SIZE", "RESTORE", "REASON", "FOR")
    rows = (
        (
            moment(v["wall_ns"]),
            ", ".join(v["documents"]),
            f"[{v['start']}, {v['stop']})",
            v["tier"],
            v["action"],
            size(v["size_bytes"]),
            nanoseconds(v["restore_ns"]),
            v["reason"],
            v["wanted_by"] or "-",
        )
        for v in found
    )
    return table(columns, rows, numbers=("SIZE", "RESTORE"))


def hints(found: Sequence[Json]) -> Table:
    """Announced queries."""
    columns = ("NEXT", "DOCUMENT", "TO", "QUERIES", "PREDICTED", "MOVED", "DISPLACED", "LEFT", "OWNER", "STATE")
    rows = (
        (
            "-" if h["position"] is None else h["position"] + 1,
            f"{h['tenant']}/{h['document']}",
            h["target"],
            h["queries"],
            nanoseconds(h["predicted_ns"]),
            size(h["moved_bytes"]),
            size(h["displaced_bytes"]),
            duration(h["remaining_seconds"]) if h["remaining_seconds"] > 0 else "-",
            h["owner"] or "-",
            h["state"],
        )
        for h in found
    )
    return table(columns, rows, numbers=("NEXT", *columns[3:8]))


def hint_counts(found: Json) -> Table:
    """How hints ended, and what was moved for nothing."""
    c = found["counts"]
    ended = ", ".join(f"{c[f'hints_{how}']} {how}" for how in ("expired", "evicted", "cancelled", "refused"))
    return pairs(
        (
            ("queries", f"{found['queries_waiting']} announced"),
            ("hints", f"{c['hints']}, {c['hints_promoted']} brought near"),
            ("used", f"{c['hints_used']}, {c['hints_in_time']} of them after all was there"),
            ("else", ended),
            ("moved", f"{size(c['prefetched_bytes'])}; {c['prefetched_unused']} documents were brought for nothing"),
        )
    )


def swaps(found: Sequence[Json]) -> Table:
    """Receipts of attaches."""
    columns = (
        "WHEN",
        "DOCUMENT",
        "TO",
        "FROM",
        "MOVED",
        "WAITED",
        "TOOK",
        "EXPOSED",
        "PREDICTED",
        "RECOMPUTE",
        "QUERIES",
        "STRATEGY",
        "OUTCOME",
    )
    rows = (
        (
            moment(s["started_wall_ns"]),
            s["document"],
            s["group"] or "ddr",
            s["source_tier"],
            size(s["moved_bytes"]),
            nanoseconds(s["wait_ns"]),
            nanoseconds(s["reattach_ns"]),
            nanoseconds(s["exposed_ns"]),
            nanoseconds(s["predicted_ns"]),
            nanoseconds(s["recompute_ns"]),
            s["queries"],
            s["strategy"] or "-",
            s["outcome"],
        )
        for s in found
    )
    return table(columns, rows, numbers=columns[4:11])


def swap_details(found: Sequence[Json]) -> Group:
    """Receipts in full, each hop by hop, and why its ranks exchanged KV as they did."""
    return Group(*(part for s in found for part in (_swap(s), "")))


def _swap(s: Json) -> Table:
    hops = [
        (h["hop"], f"{size(h['size_bytes'])} in {h['moves']} moves, {nanoseconds(h['elapsed_ns'])}") for h in s["hops"]
    ]
    return pairs(
        (
            ("swap", s["id"]),
            ("document", s["document"]),
            ("when", moment(s["started_wall_ns"])),
            ("tokens", s["token_count"]),
            ("to", s["group"] or "ddr"),
            ("from", s["source_tier"]),
            *hops,
            ("waited", nanoseconds(s["wait_ns"])),
            ("took", f"{nanoseconds(s['reattach_ns'])}, predicted {nanoseconds(s['predicted_ns'])}"),
            ("recompute", f"{nanoseconds(s['recompute_ns'])} instead"),
            ("exposed", nanoseconds(s["exposed_ns"])),
            ("question", f"{nanoseconds(s['prefill_ns'])}, then {nanoseconds(s['decode_ns'])} of decode"),
            ("answer", "-" if s["answer_tokens"] is None else f"{s['answer_tokens']} tokens"),
            ("queries", s["queries"]),
            ("strategy", s["strategy_reason"] or s["strategy"] or "-"),
            ("outcome", s["outcome"]),
        )
    )
