"""Uses: what the eviction policy is told of attaches, publishing and leases. Looking is no use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..eviction.policy import Policy
from ..eviction.use import Use
from .clock import Clock
from .document import Document
from .extent import ExtentId
from .ledger import Seen
from .opaque import is_opaque, worth_tokens
from .recent import RecentUse, RecentUses
from .state import DocumentRecord, ExtentRecord, State

Chains = tuple[tuple[ExtentId, ...], ...]
"""One a layer group, each in document order."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A use that goes on: what the policy was told of it, and how it is remembered."""

    chains: Chains
    recent: RecentUse


class Uses:
    """Tells the policy, counts on the document's record, and remembers the newest for `holdfast trace record`."""

    def __init__(self, state: State, policy: Policy, clock: Clock) -> None:
        self._state = state
        self._policy = policy
        self._clock = clock
        self.recent = RecentUses(clock.wall_ns())
        policy.released((), clock.monotonic_ns())  # the time: what a restart finds came now, not when the machine did

    def published(self, document: Document) -> None:
        """Publishing is a use of the whole document. Told before its copies are there for others."""
        if is_opaque(self._state.specs[document.fingerprint]):
            return  # objects are told together
        chains = _split(document.extents, self._groups(document))
        self._used(document, chains, document.token_count)
        self._remember(document, chains[0], len(chains[0]), document.token_count)

    def attached(self, owner: DocumentRecord, records: Sequence[ExtentRecord]) -> Attached:
        """A use of these extents of it, which are all or a range; `released` wants to have back what this returns.

        It is remembered as a use of all that is in front of them too.
        """
        groups = self._groups(owner.document)
        if not owner.chains:
            owner.chains = _split(owner.document.extents, groups)
        whole = chains = owner.chains
        last = records[len(records) // groups - 1].extent
        if len(records) < len(owner.document.extents):
            chains = _split(tuple(record.extent.id for record in records), groups)
        self._used(owner.document, chains, sum(record.extent.valid_tokens for record in records) // groups)
        self.count(owner)
        count = -(-last.stop // self._extent_tokens(owner.document))
        recent = self._remember(owner.document, whole[0], count, last.stop)
        recent.is_open = True
        return Attached(chains, recent)

    def objects(self, run: Sequence[Document]) -> Attached:
        """A use of objects that follow each other: one chain, as if they were one document's; see `released`."""
        first = run[0]
        chain = tuple(document.extents[0] for document in run)
        unit_tokens = worth_tokens(self._state.specs[first.fingerprint], first.token_count)
        now_ns, token_count = self._clock.monotonic_ns(), len(chain) * unit_tokens
        self._state.quality.used(chain, self._state.extents, (), now_ns)
        session = str(first.id)
        use = Use(chain=chain, token_count=token_count, unit_tokens=unit_tokens, now_ns=now_ns, session=session)
        self._policy.used(use)
        recent = self.recent.add(now_ns, run[-1].id, chain, len(chain), unit_tokens, token_count)
        return Attached((chain,), recent)

    def count(self, owner: DocumentRecord) -> None:
        """For people: one more use of a document."""
        owner.use_count += 1
        owner.last_use_ns = self._clock.monotonic_ns()

    def reported(self, attached: Attached, seen: Seen) -> None:
        """An engine tells what it answered."""
        attached.recent.answer_tokens += seen.answer_tokens

    def released(self, attached: Attached) -> None:
        """The lease of an attach has ended."""
        attached.recent.is_open = False
        for chain in attached.chains:
            self._policy.released(chain, self._clock.monotonic_ns())

    def _remember(self, document: Document, chain: Sequence[ExtentId], count: int, token_count: int) -> RecentUse:
        now_ns, extent_tokens = self._clock.monotonic_ns(), self._extent_tokens(document)
        return self.recent.add(now_ns, document.id, chain, count, extent_tokens, token_count)

    def _extent_tokens(self, document: Document) -> int:
        return self._state.specs[document.fingerprint].extent_tokens

    def _groups(self, document: Document) -> int:
        return len(self._state.specs[document.fingerprint].groups)

    def _used(self, document: Document, chains: Chains, token_count: int) -> None:
        now_ns = self._clock.monotonic_ns()
        unit_tokens = self._extent_tokens(document)
        session = str(document.id)
        in_hbm = [shard.copies for shard in self._state.shards_of(document)]
        for chain in chains:
            self._state.quality.used(chain, self._state.extents, in_hbm, now_ns)
            use = Use(chain=chain, token_count=token_count, unit_tokens=unit_tokens, now_ns=now_ns, session=session)
            self._policy.used(use)


def _split(extents: tuple[ExtentId, ...], groups: int) -> Chains:
    """With one layer group the very same object, so that what a document is told to be costs nothing to tell again."""
    if groups == 1:
        return (extents,)
    count = len(extents) // groups
    return tuple(extents[first : first + count] for first in range(0, len(extents), count))
