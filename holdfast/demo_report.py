"""Demo report: what the demo found, as one JSON object or as tables."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
from rich import box
from rich.console import Console, Group
from rich.table import Table

from .cli_tables import duration, size
from .kvstore.views import HopView, VerdictView


class Output(StrEnum):
    """For whom a report is printed."""

    PEOPLE = "people"
    MACHINES = "machines"


class QuestionRecord(msgspec.Struct, kw_only=True):
    """One question to one group. Times in seconds. `speed_up` compares times to the first token."""

    label: str
    question: str
    cp: int
    tokens: list[int]
    tokens_identical: bool
    argmax_equal: bool
    max_logit_error: float
    distinct_tokens: int
    source_tier: str
    moved_bytes: int
    hops: list[HopView]
    reattach_seconds: float
    exposed_seconds: float
    first_token_seconds: float
    decode_seconds: float
    recompute_seconds: float
    speed_up: float


class DocumentFate(msgspec.Struct, kw_only=True):
    """Where a document ended up, and why."""

    name: str
    role: str
    questions: int
    size_bytes: int
    resident_bytes: dict[str, int]
    missing_tokens: int
    why: str


class Metrics(msgspec.Struct, kw_only=True):
    """The four costs of long context (arXiv 2405.08944), measured."""

    concurrency_documents: dict[str, int]
    prefill_tokens_per_second: float
    prefill_seconds: float
    decode_tokens_per_second: dict[str, float]
    context_switch_seconds: dict[str, float]
    context_switch_share: float


class DemoReport(msgspec.Struct, kw_only=True):
    """Everything."""

    tokens_identical: bool
    max_logit_error: float
    control_detected: bool
    control_max_logit_error: float
    cp_degrees: list[int]
    stored_with_cp: int
    document_tokens: int
    document_bytes: int
    model: str
    daemon_killed: bool
    questions: list[QuestionRecord]
    pressure: list[DocumentFate]
    verdicts: list[VerdictView]
    pressure_as_expected: bool
    metrics: Metrics
    elapsed_seconds: float
    passed: bool


TIER_NAMES = {"hbm": "HBM", "ddr": "DDR", "nvme": "NVMe"}


def once(records: Sequence[QuestionRecord]) -> list[QuestionRecord]:
    """The first record of each (question, degree, source), for people; the JSON report has all."""
    found: dict[tuple[str, int, str], QuestionRecord] = {}
    for record in records:
        found.setdefault((record.label, record.cp, record.source_tier), record)
    return list(found.values())


def hop_text(hops: Sequence[HopView]) -> str:
    """The hops of a swap, one after the other."""
    return "\n".join(f"{hop.hop} {duration(hop.elapsed_ns / 1e9)}" for hop in hops) or "nothing moved"


def swap_table(records: Sequence[QuestionRecord]) -> Table:
    """What each answer needed to be moved. Narrow enough for 80 columns, as the next one."""
    caption = "moved: over all hops. exposed: what the decoder waited for."
    table = Table(
        title="Questions: what had to move",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE,
    )
    for name in ("asked", "from", "moved", "reattach", "by hop", "exposed"):
        table.add_column(name, justify="right" if name in ("moved", "reattach", "exposed") else "left")
    for r in once(records):
        table.add_row(
            f"{r.label} cp={r.cp}",
            TIER_NAMES[r.source_tier],
            size(r.moved_bytes),
            duration(r.reattach_seconds),
            hop_text(r.hops),
            duration(r.exposed_seconds),
        )
    return table


def answer_table(records: Sequence[QuestionRecord]) -> Table:
    """How fast each answer came, what it saved, and whether it is right."""
    caption = "speed-up: first token after prefilling the document again, over first token."
    table = Table(
        title="Questions: what it saved",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE,
    )
    for name in ("asked", "from", "first token", "decode", "recompute", "speed-up", "logit error", "same"):
        table.add_column(name, justify="left" if name in ("asked", "from", "same") else "right")
    for r in once(records):
        table.add_row(
            f"{r.label} cp={r.cp}",
            TIER_NAMES[r.source_tier],
            duration(r.first_token_seconds),
            duration(r.decode_seconds),
            duration(r.recompute_seconds),
            f"{r.speed_up:.0f}x",
            f"{r.max_logit_error:.1e}",
            "yes" if r.tokens_identical else "NO",
        )
    return table


def fate_table(fates: Sequence[DocumentFate]) -> Table:
    """One row per document."""
    table = Table(title="Under pressure", title_justify="left", box=box.SIMPLE)
    for name in ("document", "role", "asked", "size", "now in", "why"):
        table.add_column(name, justify="right" if name in ("asked", "size") else "left", no_wrap=name != "why")
    for f in fates:
        tiers = [name for tier, name in TIER_NAMES.items() if f.resident_bytes.get(tier) == f.size_bytes]
        parts = [f"part of {TIER_NAMES[tier]}" for tier, n in f.resident_bytes.items() if 0 < n < f.size_bytes]
        gone = [f"{f.missing_tokens} tokens gone"] if f.missing_tokens else []
        table.add_row(f.name, f.role, str(f.questions), size(f.size_bytes), ", ".join(tiers + parts + gone), f.why)
    return table


def metric_table(report: DemoReport) -> Table:
    """The four metrics."""
    m = report.metrics
    table = Table(title="The four costs of long context", title_justify="left", box=box.SIMPLE)
    table.add_column("metric")
    table.add_column("measured")
    fits = ", ".join(f"{count} in {TIER_NAMES[tier]}" for tier, count in m.concurrency_documents.items())
    decode = ", ".join(f"{rate:.0f} tokens/s at cp={cp}" for cp, rate in m.decode_tokens_per_second.items())
    switch = ", ".join(f"{duration(s)} from {TIER_NAMES[tier]}" for tier, s in m.context_switch_seconds.items())
    table.add_row("concurrency", f"documents of this size that fit: {fits}")
    table.add_row("prefill", f"{duration(m.prefill_seconds)} ({m.prefill_tokens_per_second:.0f} tokens/s)")
    table.add_row("decode", decode)
    table.add_row("context switch", f"{switch}; {m.context_switch_share:.1%} of the time spent answering")
    return table


def show(report: DemoReport, console: Console) -> None:
    """Print the tables and the conclusion."""
    questions = (swap_table(report.questions), answer_table(report.questions))
    console.print(Group(*questions, fate_table(report.pressure), metric_table(report)))
    degrees = ", ".join(str(cp) for cp in report.cp_degrees)
    verdict = "[green]passed[/]" if report.passed else "[red]FAILED[/]"
    console.print(
        f"{verdict}: stored with {report.stored_with_cp} ranks, answered with {degrees}; "
        f"tokens identical: {report.tokens_identical}, max logit error {report.max_logit_error:.1e} (limit 1e-4); "
        f"corrupted control detected: {report.control_detected} (error {report.control_max_logit_error:.1e}); "
        f"{report.elapsed_seconds:.0f} s"
    )


def as_json(report: DemoReport) -> str:
    """The whole report as one object."""
    raw: Any = msgspec.to_builtins(report)
    return msgspec.json.format(msgspec.json.encode(raw)).decode()
