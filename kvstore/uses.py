"""Uses: what the eviction policy is told of attaches, publishing and leases. Looking is no use."""

from __future__ import annotations

from collections.abc import Sequence

from ..eviction.policy import Policy
from ..eviction.use import Use
from .clock import Clock
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

    def published(self, owner: DocumentRecord) -> None:
        """Publishing is a use of the whole document."""
        self._used(owner, _whole(owner, self._groups(owner)), owner.document.token_count)

    def attached(self, owner: DocumentRecord, records: Sequence[ExtentRecord]) -> Chains:
        """A use of these extents of it, which are all or a range; `released` wants to have back what this returns."""
        groups = self._groups(owner)
        chains = _whole(owner, groups)
        if len(records) < len(owner.document.extents):
            chains = _split([record.extent.id for record in records], groups)
        self._used(owner, chains, sum(record.extent.valid_tokens for record in records) // groups)
        return chains

    def released(self, chains: Chains) -> None:
        """The lease of an attach has ended."""
        for chain in chains:
            self._policy.released(chain, self._clock.monotonic_ns())

    def _groups(self, owner: DocumentRecord) -> int:
        return len(self._state.specs[owner.document.fingerprint].groups)

    def _used(self, owner: DocumentRecord, chains: Chains, token_count: int) -> None:
        now_ns = self._clock.monotonic_ns()
        owner.use_count += 1
        owner.last_use_ns = now_ns
        unit_tokens = self._state.specs[owner.document.fingerprint].extent_tokens
        session = str(owner.document.id)
        for chain in chains:
            use = Use(chain=chain, token_count=token_count, unit_tokens=unit_tokens, now_ns=now_ns, session=session)
            self._policy.used(use)


def _whole(owner: DocumentRecord, groups: int) -> Chains:
    """The document's own chains: the same objects each time."""
    if not owner.chains:
        owner.chains = (owner.document.extents,) if groups == 1 else _split(owner.document.extents, groups)
    return owner.chains


def _split(extents: Sequence[ExtentId], groups: int) -> Chains:
    count = len(extents) // groups
    return tuple(tuple(extents[first : first + count]) for first in range(0, len(extents), count))
