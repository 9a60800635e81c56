"""Every error Holdfast raises for the world's mistakes (our own mistakes are assertions).

HoldfastError
|-- InvalidRequest          the caller asked for something that can never work
|   |-- ConfigError             a config file, variable or flag is wrong
|   |-- InvalidSpec             a KVSpec that describes no KV we can hold
|   |-- InvalidName             a document or tenant name we refuse
|   |-- EmptyDocument           a document without tokens
|   |-- TokenOutOfRange         a token id outside the model's vocabulary
|   |-- PartialPage             native KV whose last page is not full
|   |-- UnknownPageFormat       native KV in pages that this installation cannot read
|   |-- LayoutError             a layout that does not cover what is asked of it
|   |-- ProtocolError           bytes on the socket that are not our protocol
|   |   |-- MalformedFrame          a frame that does not decode
|   |   |-- FrameTooLarge           a frame above the limit
|   |   `-- VersionMismatch         a peer speaking another protocol version
|   `-- DocumentTooLarge        more bytes than all tiers together can hold
|-- NotFound
|   |-- DocumentNotFound
|   |-- PrefixNotFound          nothing in the cache begins as these tokens do: a miss
|   |-- GroupNotFound
|   `-- ClaimNotFound           no such lease, pin or ingest
|-- Conflict                the request is fine, the state forbids it
|   |-- DocumentExists          the name is taken by other tokens
|   |-- DocumentIncomplete      some of its KV is gone: recompute the named token range
|   |-- SpecMismatch            KV of another model, or of another revision of it
|   |-- PinsOvercommitted       a pin beyond the byte budget, or that would not fit
|   |-- LeasesOvercommitted     a lease beyond what its tenant may lease
|   `-- InUse                   leased or pinned, so it cannot leave now
|-- NoCapacity              everything that could leave is leased or pinned; names the holders
|   `-- QuotaExceeded           the tenant has as much as it may, and not enough of its own can leave
|-- Unavailable             try again, or go on without the cache
|   |-- DaemonUnavailable       the daemon does not answer, or went away
|   |-- DeadlineExceeded        it took longer than the caller allowed
|   |-- Draining                the daemon is shutting down
|   |-- Bypassed                an operator has taken the cache out of everybody's way
|   |-- GroupFailed             a rank of the group died or raised
|   |-- RunnerUnavailable       no runner answers, or it went away
|   `-- RunnerBusy              too many requests wait for the runner already
|-- CorruptExtent           stored bytes differ from their checksum; quarantined
|-- StorageFailed           the device below a tier refused a read or a write
|   `-- StorageFull             it has no room: fewer bytes must be kept there
|-- DataDirectoryBusy       another daemon owns the data directory
`-- MissingExtra            an optional dependency is absent; names the extra to install

`code` is stable and travels on the wire and in RFC 9457 problems. HTTP statuses are the admin API's affair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final

from .holders import Holder

TOKEN_RANGE: Final = re.compile(r"tokens \[(\d+), (\d+)\)")


class HoldfastError(Exception):
    """Base of every typed error; `code` identifies the class on the wire.

    `holders` are those who would have to let go, where that is what is wrong, the largest first; they travel too.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "", holders: Sequence[Holder] = ()) -> None:
        super().__init__(message)
        self.holders = tuple(holders)

    @property
    def message(self) -> str:
        """The sentence for a person: what is wrong and what to do."""
        return str(self)

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        """The tokens [start, stop) that have to be recomputed, where that is what is wrong: the message names them."""
        return tuple((int(start), int(stop)) for start, stop in TOKEN_RANGE.findall(self.message))


class InvalidRequest(HoldfastError):
    """The caller asked for something that can never work."""

    code = "invalid-request"


class ConfigError(InvalidRequest):
    """A config file, environment variable or flag is wrong."""

    code = "config-error"


class InvalidSpec(InvalidRequest):
    """A KVSpec that describes no KV we can hold."""

    code = "invalid-spec"


class InvalidName(InvalidRequest):
    """A document or tenant name that is empty, too long or has control characters."""

    code = "invalid-name"


class EmptyDocument(InvalidRequest):
    """A document without tokens."""

    code = "empty-document"


class TokenOutOfRange(InvalidRequest):
    """A token id outside the model's vocabulary."""

    code = "token-out-of-range"


class PartialPage(InvalidRequest):
    """Native KV whose last page is not full: store whole pages, or canonical KV."""

    code = "partial-page"


class UnknownPageFormat(InvalidRequest):
    """Native KV in pages that this installation cannot read: only engines that make such pages can use it."""

    code = "unknown-page-format"


class LayoutError(InvalidRequest):
    """A layout that does not cover what is asked of it."""

    code = "layout-error"


class ProtocolError(InvalidRequest):
    """Bytes on the socket that are not our protocol."""

    code = "protocol-error"


class MalformedFrame(ProtocolError):
    """A frame that does not decode to a known message."""

    code = "malformed-frame"


class FrameTooLarge(ProtocolError):
    """A frame above the configured limit."""

    code = "frame-too-large"


class VersionMismatch(ProtocolError):
    """A peer that speaks another protocol version."""

    code = "version-mismatch"


class DocumentTooLarge(InvalidRequest):
    """More bytes than all tiers together can hold."""

    code = "document-too-large"


class NotFound(HoldfastError):
    """What was named does not exist."""

    code = "not-found"


class DocumentNotFound(NotFound):
    """No document of that name in that tenant."""

    code = "document-not-found"


class PrefixNotFound(NotFound):
    """Nothing in the cache begins as these tokens do."""

    code = "prefix-not-found"


class GroupNotFound(NotFound):
    """No group of that name, or not all of its ranks are registered."""

    code = "group-not-found"


class ClaimNotFound(NotFound):
    """No such lease, pin or ingest (it may have ended)."""

    code = "claim-not-found"


class Conflict(HoldfastError):
    """The request is well-formed but the state forbids it."""

    code = "conflict"


class DocumentExists(Conflict):
    """The name is taken by other tokens."""

    code = "document-exists"


class DocumentIncomplete(Conflict):
    """Part of the document's KV is gone; the message names the token range to recompute."""

    code = "document-incomplete"


class SpecMismatch(Conflict):
    """KV of another model, or of another revision of the same one."""

    code = "spec-mismatch"


class PinsOvercommitted(Conflict):
    """The pin would exceed the byte budget for pins."""

    code = "pins-overcommitted"


class LeasesOvercommitted(Conflict):
    """The tenant's leases would keep more of DDR than it may lease."""

    code = "leases-overcommitted"


class InUse(Conflict):
    """Leased, pinned or being filled, so it cannot leave now."""

    code = "in-use"


class NoCapacity(HoldfastError):
    """Nothing more may leave: the rest is leased or pinned. The message names the holders."""

    code = "no-capacity"


class QuotaExceeded(NoCapacity):
    """The tenant may have no more of a tier, and not enough of what it has there can leave."""

    code = "quota-exceeded"


class Unavailable(HoldfastError):
    """Try again later, or go on without the cache."""

    code = "unavailable"


class DaemonUnavailable(Unavailable):
    """The daemon does not answer, or the connection to it ended."""

    code = "daemon-unavailable"


class DeadlineExceeded(Unavailable):
    """It took longer than the caller allowed."""

    code = "deadline-exceeded"


class Bypassed(Unavailable):
    """An operator has switched the cache off for all; go on without it."""

    code = "bypassed"


class Draining(Unavailable):
    """The daemon is shutting down and takes no new work."""

    code = "draining"


class GroupFailed(Unavailable):
    """A rank of the group died or raised."""

    code = "group-failed"


class RunnerUnavailable(Unavailable):
    """No runner answers, or it went away."""

    code = "runner-unavailable"


class RunnerBusy(Unavailable):
    """Too many requests wait for the runner already."""

    code = "runner-busy"


class CorruptExtent(HoldfastError):
    """Stored bytes differ from their checksum; the extent is quarantined."""

    code = "corrupt-extent"


class StorageFailed(HoldfastError):
    """The device below a tier refused a read or a write; `moved_bytes` of it had been done by then."""

    code = "storage-failed"
    moved_bytes: int = 0


class StorageFull(StorageFailed):
    """The device below a tier has no room, or a quota says so: keep fewer bytes there."""

    code = "storage-full"


class DataDirectoryBusy(HoldfastError):
    """Another daemon owns the data directory."""

    code = "data-directory-busy"


class MissingExtra(HoldfastError):
    """An optional dependency is absent; the message names the extra to install."""

    code = "missing-extra"


def all_errors() -> dict[str, type[HoldfastError]]:
    """Every error class by its code; the wire and the admin API map through this."""
    found: dict[str, type[HoldfastError]] = {}
    pending: list[type[HoldfastError]] = [HoldfastError]
    while pending:
        kind = pending.pop()
        assert kind.code not in found, f"two errors share the code {kind.code}"
        found[kind.code] = kind
        pending.extend(kind.__subclasses__())
    return found


def from_code(code: str, message: str, holders: Sequence[Holder] = ()) -> HoldfastError:
    """Rebuild an error that travelled as (code, message, holders); an unknown code keeps its text."""
    kind = all_errors().get(code)
    return kind(message, holders) if kind is not None else HoldfastError(f"{code}: {message}", holders)
