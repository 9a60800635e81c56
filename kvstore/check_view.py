"""Check view: what a check found, as the admin API and `holdfast check --json` show it."""

from __future__ import annotations

import msgspec

from .check import Report
from .findings import KINDS, Finding, remain


class FindingView(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. `fix` is what a repair does, null where only a person can help; `fixed` whether it was done."""

    code: str
    severity: str
    subject: str
    detail: str
    cause: str
    advice: str
    fix: str | None
    fixed: bool

    @classmethod
    def of(cls, finding: Finding, *, fixed: bool) -> FindingView:
        """Show a finding."""
        kind = KINDS[finding.code]
        return cls(
            code=finding.code.value,
            severity=kind.severity.value,
            subject=finding.subject,
            detail=finding.detail,
            cause=kind.cause,
            advice=kind.advice,
            fix=kind.fix if finding.repair is not None else None,
            fixed=fixed,
        )


class CheckView(msgspec.Struct, frozen=True, kw_only=True):
    """A check. `state` is "running" or "done"; `clean`: nothing worse than a note remains."""

    state: str
    clean: bool
    findings: list[FindingView]
    remaining: list[FindingView]
    documents: int
    extents: int
    read_bytes: int
    total_bytes: int
    elapsed_seconds: float

    @classmethod
    def running(cls, read_bytes: int, total_bytes: int) -> CheckView:
        """Show a check that is under way."""
        return cls(
            state="running",
            clean=False,
            findings=[],
            remaining=[],
            documents=0,
            extents=0,
            read_bytes=read_bytes,
            total_bytes=total_bytes,
            elapsed_seconds=0.0,
        )

    @classmethod
    def of(cls, report: Report) -> CheckView:
        """Show a check that ended."""
        fixed = {finding.identity for finding in report.fixed} - {finding.identity for finding in report.remaining}
        return cls(
            state="done",
            clean=not remain(report.remaining),
            findings=[FindingView.of(finding, fixed=finding.identity in fixed) for finding in report.found],
            remaining=[FindingView.of(finding, fixed=False) for finding in report.remaining],
            documents=report.documents,
            extents=report.extents,
            read_bytes=report.read_bytes,
            total_bytes=report.read_bytes,
            elapsed_seconds=report.elapsed_ns / 1e9,
        )
