"""Hints: documents whose queries are known before they run, bounded, and what is believed of them. Pure bookkeeping.

A hint shields its document's copies until it is used or ends, and lets it displace others, but all hints together only
within SHARE of a device, in the order in which they came (one document always may, whatever its size): so hints cannot
take over a cache. Beyond that a hint may use free room. Shielded copies leave last, but they leave for whoever needs
their room. A hint is believed at first; each time that a document was brought near for nothing halves the belief
in its owner's next hints on it, until one of them is used.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from .document import DocumentId
from .errors import NoCapacity
from .residency import Tier
from .upcoming import Upcoming

HINTS_MAX: Final = 128  # that have not ended
OWNER_MAX: Final = 32  # of one owner, so that none takes all places: a runner's whole queue
ENDED_MAX: Final = 128  # that are remembered, to be shown
BOUNCES_MAX: Final = 10  # more make no difference
BOUNCED_MAX: Final = 1024  # documents and owners that are remembered for it; the oldest are forgotten
SHARE: Final = 0.5
BELIEF: Final = 0.98  # in an owner that was not wrong before: queries that wait already seldom go away


class HintState(StrEnum):
    """Where a hint is. `STAGED`: in DDR, while its group has no room for it. From `USED` on it has ended."""

    WAITING = "waiting"
    MOVING = "moving"
    STAGED = "staged"
    PROMOTED = "promoted"
    USED = "used"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    EVICTED = "evicted"


OPEN: Final = (HintState.WAITING, HintState.STAGED)  # of which something can still be brought nearer
WASTED: Final = (
    HintState.EXPIRED,
    HintState.EVICTED,
)  # what was moved then was moved for nothing, by its owner's fault


@dataclass(eq=False, slots=True, kw_only=True)
class Hint:
    """`queries` on a document are expected in DDR (`group` None) or in a group's HBM, by `deadline_ns` if there is one.

    `client` is the connection that gave it, `owner` what it calls itself; the hint ends with either's word, and at
    `expires_ns` at the latest. Times are monotonic. `load_ns` is the predicted time of what is missing, as it was when
    last looked at; `moved_bytes` what was moved for it, `displaced` what left for it, by device.
    """

    id: int
    client: int
    owner: str
    document: DocumentId
    group: str | None
    device: str
    queries: int
    size_bytes: int
    came_ns: int
    deadline_ns: int | None
    expires_ns: int
    load_ns: int
    state: HintState = HintState.WAITING
    reason: str = ""
    overtaken: int = 0
    able: bool = True  # to be tried now; False after it found no room, until something may have changed
    moved_bytes: int = 0
    displaced: Counter[str] = field(default_factory=Counter)

    @property
    def whose(self) -> tuple[int, str]:
        """Its owner: a name is one of a connection's."""
        return (self.client, self.owner)


class Hints:
    """The hints of now, and the last that ended."""

    def __init__(self) -> None:
        self.live: dict[int, Hint] = {}  # by id, the oldest first
        self.ended: deque[Hint] = deque(maxlen=ENDED_MAX)
        self._bounced: dict[tuple[str, DocumentId], int] = {}
        self._shielded: dict[str, frozenset[DocumentId]] = {}  # by device, until a hint changes
        self._named: frozenset[DocumentId] | None = None  # until a hint changes

    def add(self, hint: Hint) -> None:
        """Raises NoCapacity when there are too many: whoever hinted earlier keeps the place."""
        own = sum(other.whose == hint.whose for other in self.live.values())
        if own >= OWNER_MAX or len(self.live) >= HINTS_MAX:
            limit = f"{OWNER_MAX} of them are {hint.owner!r}'s" if own >= OWNER_MAX else f"{HINTS_MAX} of them wait"
            raise NoCapacity(f"no room for another hint: {limit}; one that is used, cancelled or expired makes room")
        self.live[hint.id] = hint
        self.changed()

    def changed(self) -> None:
        """Some hint shields other copies than before."""
        self._shielded.clear()
        self._named = None

    @property
    def named(self) -> frozenset[DocumentId]:
        """Documents whose queries are announced."""
        if self._named is None:
            self._named = frozenset(hint.document for hint in self.live.values())
        return self._named

    def find(self, whose: tuple[int, str], document: DocumentId, group: str | None) -> Hint | None:
        """The owner's hint on this document for this target."""
        wanted = (whose, document, group)
        return next((h for h in self.live.values() if (h.whose, h.document, h.group) == wanted), None)

    def end(self, hint: Hint, state: HintState, reason: str) -> None:
        """It is over, and why."""
        key = (hint.owner, hint.document)
        if state is HintState.USED:
            self._bounced.pop(key, None)
        elif state in WASTED and hint.moved_bytes:
            self._bounced[key] = self._bounced.pop(key, 0) + 1
            if len(self._bounced) > BOUNCED_MAX:
                del self._bounced[next(iter(self._bounced))]
        hint.state, hint.reason = state, reason
        del self.live[hint.id]
        self.ended.append(hint)
        self.changed()

    def belief(self, hint: Hint) -> float:
        """How likely the document is to be used as this owner says: BELIEF, halved by each time that it was not."""
        return BELIEF * 0.5 ** min(BOUNCES_MAX, self._bounced.get((hint.owner, hint.document), 0))

    def upcoming(self) -> list[Upcoming]:
        """Those of which something is to be brought nearer, as the rule of their order wants them."""
        return [
            Upcoming(
                id=hint.id,
                load_ns=hint.load_ns,
                queries=hint.queries * self.belief(hint),
                deadline_ns=hint.deadline_ns,
                overtaken=hint.overtaken if hint.state is HintState.WAITING else 0,
                able=hint.able,
            )
            for hint in self.live.values()
            if hint.state in OPEN
        ]

    # What they shield --------------------------------------------------------------------------

    def shielded(self, tier: Tier, device: str, capacity_bytes: int) -> frozenset[DocumentId]:
        """Documents whose copies on a device leave behind all others'."""
        found = self._shielded.get(device)
        if found is None:
            left_bytes = SHARE * capacity_bytes
            documents: set[DocumentId] = set()
            for hint in self.live.values():
                fits = hint.size_bytes <= left_bytes or not documents
                if fits and _is_on(hint, tier, device) and hint.document not in documents:
                    left_bytes -= hint.size_bytes
                    documents.add(hint.document)
            found = self._shielded[device] = frozenset(documents)
        return found

    def weighs_more(self, hint: Hint, restore_ns: Sequence[int]) -> bool:
        """Whether the load that a hint saves is worth more than what would leave for it; expected nanoseconds.

        If the queries come, the attach would send the victims away anyway, and the load is saved. If they do not, the
        victims' return (`restore_ns`, each) is lost. So equal loads displace each other until a hint was wrong once,
        and what would have to be computed again hardly ever leaves for a hint.
        """
        belief = self.belief(hint)
        return belief * hint.load_ns > (1 - belief) * sum(restore_ns)

    def of(self, documents: Collection[DocumentId], group: str | None) -> list[Hint]:
        """Hints which a use of any of these documents in DDR, or there in a group, is what they have announced."""
        return [h for h in self.live.values() if h.document in documents and h.group in (None, group)]


def _is_on(hint: Hint, tier: Tier, device: str) -> bool:
    """Whether a hint is about copies there. What is in its group's HBM by now does not need its copy in DDR as much."""
    if tier is Tier.HBM:
        return hint.device == device
    return tier is Tier.NVME or hint.group is None or hint.state is not HintState.PROMOTED
