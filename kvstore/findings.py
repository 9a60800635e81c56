"""Findings: what an audit may find wrong, as coded values: state, cause, advice, and what a repair would do.

Codes are stable. A repair never deletes a document or an extent whose bytes are good: it drops rows that point nowhere,
files that nothing names, and claims of nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from .extent import ExtentId
from .orders import Record


class Severity(StrEnum):
    """An error loses or may lose data; a warning wastes or contradicts; a note is what a crash or a verdict leaves."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Code(StrEnum):
    """What is wrong. See KINDS."""

    SQLITE_INTEGRITY = "sqlite-integrity"
    ROW_UNREADABLE = "row-unreadable"
    DOCUMENT_WITHOUT_SPEC = "document-without-spec"
    DOCUMENT_ROW_MISMATCH = "document-row-mismatch"
    DOCUMENT_HAS_HOLE = "document-has-hole"
    DOCUMENT_WITHOUT_ROW = "document-without-row"
    DOCUMENT_ROW_STALE = "document-row-stale"
    EXTENT_ROW_MISMATCH = "extent-row-mismatch"
    EXTENT_ROW_OUTSIDE_SEGMENT = "extent-row-outside-segment"
    EXTENT_ORPHAN = "extent-orphan"
    EXTENT_WITHOUT_ROW = "extent-without-row"
    EXTENT_ROW_STALE = "extent-row-stale"
    EXTENT_ROW_DIFFERS = "extent-row-differs"
    EXTENT_CORRUPT = "extent-corrupt"
    EXTENT_UNREADABLE = "extent-unreadable"
    SLOTS_OVERLAP = "slots-overlap"
    SEGMENT_MIXED = "segment-mixed"
    SEGMENT_FILE_MISSING = "segment-file-missing"
    SEGMENT_FILE_SHORT = "segment-file-short"
    SEGMENT_FILE_ORPHAN = "segment-file-orphan"
    SLAB_FILE_ORPHAN = "slab-file-orphan"
    FOREIGN_FILE = "foreign-file"
    BUDGET_EXCEEDED = "budget-exceeded"
    PIN_WITHOUT_DOCUMENT = "pin-without-document"
    CLAIM_OF_NOBODY = "claim-of-nobody"
    ACCOUNTS_DIFFER = "accounts-differ"
    STALE_ADDRESS = "stale-address"
    STALE_SOCKET = "stale-socket"


class Kind(NamedTuple):
    """What is known of a code: how bad, why it can happen, what to do. `fix` is what a repair does; "" for none."""

    severity: Severity
    cause: str
    advice: str
    fix: str = ""


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_LOST_ROW: Final = "drop the row: the document keeps a named hole, which an ingest fills"

KINDS: Final[dict[Code, Kind]] = {
    Code.SQLITE_INTEGRITY: Kind(
        _E, "the catalog file was damaged below SQLite", "restore the catalog from a backup, or move the directory away"
    ),
    Code.ROW_UNREADABLE: Kind(
        _E, "the catalog was edited or damaged", "fix it, or restore the catalog", "drop the row, where it can be lost"
    ),
    Code.DOCUMENT_WITHOUT_SPEC: Kind(_E, "the catalog was edited or damaged", "restore the catalog from a backup"),
    Code.DOCUMENT_ROW_MISMATCH: Kind(_E, "the catalog was edited or damaged", "restore the catalog from a backup"),
    Code.DOCUMENT_HAS_HOLE: Kind(
        _N, "an eviction out of nvme, or a quarantine", "ingest the document again: only the hole is written"
    ),
    Code.DOCUMENT_WITHOUT_ROW: Kind(
        _E, "the catalog was changed beside the daemon", "fix it before the next restart", "write the row again"
    ),
    Code.DOCUMENT_ROW_STALE: Kind(
        _W, "a deletion that the catalog refused", "fix it, or the name comes back", "drop the row of what was deleted"
    ),
    Code.EXTENT_ROW_MISMATCH: Kind(_E, "the catalog was edited or damaged", "fix it", _LOST_ROW),
    Code.EXTENT_ROW_OUTSIDE_SEGMENT: Kind(_E, "the catalog was edited or damaged", "fix it", _LOST_ROW),
    Code.EXTENT_ORPHAN: Kind(
        _N, "an ingest was cut off before its document was durable", "nothing: a start drops it", "drop the row"
    ),
    Code.EXTENT_WITHOUT_ROW: Kind(
        _E,
        "the catalog was changed beside the daemon",
        "fix it: the seal went with the row",
        "give the copy up; it is written again from DDR where it is there too",
    ),
    Code.EXTENT_ROW_STALE: Kind(
        _W, "the catalog was changed beside the daemon, or refused a change", "fix it", "drop the row"
    ),
    Code.EXTENT_ROW_DIFFERS: Kind(
        _E, "the catalog was changed beside the daemon", "fix it before the next restart", "write the row again"
    ),
    Code.EXTENT_CORRUPT: Kind(_E, "the device or somebody changed stored bytes", "fix it", _LOST_ROW),
    Code.EXTENT_UNREADABLE: Kind(
        _E, "the device refuses to read", "look at the kernel's log; free the document to none if it stays so"
    ),
    Code.SLOTS_OVERLAP: Kind(
        _E, "the catalog was edited or damaged", "fix it", f"of the corrupt or later one {_LOST_ROW}"
    ),
    Code.SEGMENT_MIXED: Kind(_E, "the catalog was edited or damaged", "fix it", f"of the later size {_LOST_ROW}"),
    Code.SEGMENT_FILE_MISSING: Kind(
        _E,
        "nvme.directory is another one or not mounted, or somebody removed the file",
        "configure as `serve` does (--set, --config), mount it or put it back; fix it only if the file is lost",
        _LOST_ROW,
    ),
    Code.SEGMENT_FILE_SHORT: Kind(_E, "somebody truncated the file", "put it back, or fix it", _LOST_ROW),
    Code.SEGMENT_FILE_ORPHAN: Kind(_N, "its last extent left", "nothing: a start removes it", "delete the file"),
    Code.SLAB_FILE_ORPHAN: Kind(_N, "a daemon was killed", "nothing: a start removes it", "delete the file"),
    Code.FOREIGN_FILE: Kind(_N, "somebody put it there", "move it away: its bytes are in no budget"),
    Code.BUDGET_EXCEEDED: Kind(
        _W,
        "the budget or the segment size became smaller",
        "raise the budget (or name the right --config), or accept that a start gives up what does not fit",
    ),
    Code.PIN_WITHOUT_DOCUMENT: Kind(_N, "its document was never durable", "nothing: a start drops it", "drop the pin"),
    Code.CLAIM_OF_NOBODY: Kind(_E, "a bug of ours", "fix it, and report it", "end the claims of that client"),
    Code.ACCOUNTS_DIFFER: Kind(_E, "a bug of ours", "restart the daemon, and report it"),
    Code.STALE_ADDRESS: Kind(_N, "a daemon was killed", "nothing: a start replaces it", "delete the file"),
    Code.STALE_SOCKET: Kind(_N, "a daemon was killed", "nothing: a start replaces it", "delete the file"),
}


class Commit(NamedTuple):
    """Repair: commit this record to the catalog."""

    record: Record


class Forget(NamedTuple):
    """Repair: the extent's copy on NVMe is not to be trusted or not there; its row goes, its slot becomes free."""

    extent: ExtentId


class Remove(NamedTuple):
    """Repair: delete this file."""

    path: str


class EndClaims(NamedTuple):
    """Repair: let go what a client holds that is gone."""

    client: int


Repair = Commit | Forget | Remove | EndClaims


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong with `subject`, said exactly in `detail`. `repair` None: only a person can help."""

    code: Code
    subject: str
    detail: str
    repair: Repair | None = None

    @property
    def severity(self) -> Severity:
        """See Severity."""
        return KINDS[self.code].severity

    @property
    def identity(self) -> tuple[str, str]:
        """What makes it the same finding in another audit."""
        return self.code, self.subject


def remain(findings: Iterable[Finding]) -> bool:
    """Whether any of these is worse than a note."""
    return any(finding.severity is not Severity.NOTE for finding in findings)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, then by code and subject; each once."""
    rank = list(Severity)
    unique = {(finding.identity, finding.detail): finding for finding in findings}
    return sorted(unique.values(), key=lambda f: (rank.index(f.severity), f.code, f.subject, f.detail))
