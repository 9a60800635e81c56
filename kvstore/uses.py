"""Uses: what the eviction policy is told of attaches, publishing and leases. Looking is no use."""

from __future__ import annotations

from collections.abc import Sequence

from ..eviction.policy import Policy
from ..eviction.use import Use
from .clock import Clock
from .document import Document
from .extent import ExtentId
from .state import DocumentRecord, ExtentRecord, State

Chains = tuple[tuple[ExtentId, ...], ...]
"""One a layer group, each in document order."""


class Uses:
    """Tells the policy, and counts on the document's record."""

    def __init__(self, state: State, policy: Policy, clock: Clock) -> None:
        self._state = state
        self._policy = policy
        self._clock = clock

    def published(self, document: Document) -> None:
        """Publishing is a use of the whole document. Told before its copies are there for others."""
        self._used(document, _split(document.extents, self._groups(document)), document.token_count)

    def attached(self, owner: DocumentRecord, records: Sequence[ExtentRecord]) -> Chains:
        """A use of these extents of it, which are all or a range; `released` wants to have back what this returns."""
        groups = self._groups(owner.document)
        if not owner.chains:
            owner.chains = _split(owner.document.extents, groups)
        chains = owner.chains
        if len(records) < len(owner.document.extents):
            chains = _split(tuple(record.extent.id for record in records), groups)
        self._used(owner.document, chains, sum(record.extent.valid_tokens for record in records) // groups)
        self.count(owner)
        return chains

    def count(self, owner: DocumentRecord) -> None:
        """For people: one more use of a document."""
        owner.use_count += 1
        owner.last_use_ns = self._clock.monotonic_ns()

    def released(self, chains: Chains) -> None:
        """The lease of an attach has ended."""
        for chain in chains:
            self._policy.released(chain, self._clock.monotonic_ns())

    def _groups(self, document: Document) -> int:
        return len(self._state.specs[document.fingerprint].groups)

    def _used(self, document: Document, chains: Chains, token_count: int) -> None:
        now_ns = self._clock.monotonic_ns()
        unit_tokens = self._state.specs[document.fingerprint].extent_tokens
        session = str(document.id)
        for chain in chains:
            use = Use(chain=chain, token_count=token_count, unit_tokens=unit_tokens, now_ns=now_ns, session=session)
            self._policy.used(use)


def _split(extents: tuple[ExtentId, ...], groups: int) -> Chains:
    """With one layer group the very same object, so that what a document is told to be costs nothing to tell again."""
    if groups == 1:
        return (extents,)
    count = len(extents) // groups
    return tuple(extents[first : first + count] for first in range(0, len(extents), count))
