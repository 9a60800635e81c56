"""Departures: what a document has lost, when, why and to whom; also of documents that are no more.

Verdicts are a log of copies, which one large eviction overruns. This is kept by document: copies that left a tier for
one reason, one after another, are one departure with a range of tokens. Of each document the last EACH are remembered,
and of documents the DOCUMENTS that lost something last. Those that nobody has named are not remembered: there are many.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from .document import Document, DocumentId, is_named
from .ledger import Verdict

DOCUMENTS: Final = 1024
EACH: Final = 32
NEAR: Final = 4  # how far back a departure is looked for that goes on: tiers take turns
PAUSE_NS: Final = 60_000_000_000  # after which it is another one


@dataclass(slots=True, kw_only=True)
class Departure:
    """Copies of tokens [start, stop) left a tier. `action` is "demote" where a copy stayed or was made, else "drop".

    `scores` are the policy's parts for one of the last that left, `wanted_by` who needed the room, empty where nobody
    did. `restore_ns` is what all of them together would have cost to bring back, as predicted when they left.
    """

    tier: str
    start: int
    stop: int
    first_wall_ns: int
    wall_ns: int
    reason: str
    action: str
    policy: str
    scores: Mapping[str, float]
    wanted_by: str
    copies: int = 1
    size_bytes: int = 0
    restore_ns: int = 0

    def takes(self, verdict: Verdict) -> bool:
        """Take over one more copy, if it left as these did, beside them and soon after."""
        if verdict.start > self.stop or verdict.stop < self.start or verdict.wall_ns - self.wall_ns > PAUSE_NS:
            return False
        if verdict.tier != self.tier or verdict.reason != self.reason or verdict.action != self.action:
            return False
        if verdict.policy != self.policy or verdict.wanted_by != self.wanted_by:
            return False
        self.start, self.stop = min(self.start, verdict.start), max(self.stop, verdict.stop)
        self.wall_ns = verdict.wall_ns
        if len(verdict.scores) >= len(self.scores):  # in a run of a chain only one has all the parts
            self.scores = verdict.scores
        self.copies += 1
        self.size_bytes += verdict.size_bytes
        self.restore_ns += verdict.restore_ns
        return True


@dataclass(slots=True, kw_only=True)
class Past:
    """One document's, the oldest first. Of one that is no more: what it was, and how and when it ended."""

    departures: deque[Departure] = field(default_factory=lambda: deque(maxlen=EACH))
    document: Document | None = None
    ended: str = ""
    ended_wall_ns: int = 0


class Departures:
    """By document."""

    def __init__(self) -> None:
        self._past: OrderedDict[str, Past] = OrderedDict()

    def __len__(self) -> int:
        return len(self._past)

    def of(self, document: DocumentId) -> Past | None:
        """What is remembered; looking makes it no younger."""
        return self._past.get(str(document))

    def add(self, verdict: Verdict) -> None:
        """A copy leaves."""
        for document in filter(is_named, verdict.documents):
            known = self._known(document).departures
            if not any(known[-back].takes(verdict) for back in range(1, min(NEAR, len(known)) + 1)):
                known.append(_begun(verdict))

    def ended(self, document: Document, reason: str, wall_ns: int) -> None:
        """The document itself is no more."""
        if document.id.namespace is not None:
            return
        past = self._known(str(document.id))
        past.document, past.ended, past.ended_wall_ns = document, reason, wall_ns

    def _known(self, document: str) -> Past:
        past = self._past.setdefault(document, Past())
        self._past.move_to_end(document)
        if len(self._past) > DOCUMENTS:
            self._past.popitem(last=False)
        return past


def _begun(verdict: Verdict) -> Departure:
    return Departure(
        tier=verdict.tier,
        start=verdict.start,
        stop=verdict.stop,
        first_wall_ns=verdict.wall_ns,
        wall_ns=verdict.wall_ns,
        reason=verdict.reason,
        action=verdict.action,
        policy=verdict.policy,
        scores=verdict.scores,
        wanted_by=verdict.wanted_by,
        size_bytes=verdict.size_bytes,
        restore_ns=verdict.restore_ns,
    )
