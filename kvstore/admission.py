"""Admission: whether what DDR evicts, and NVMe does not have, is worth being written there.

By the rule of write-through (see reuse): the seconds that having the whole document there saves on a return, times the
chance of one, against the price of writing it, wear included. It is asked of whole documents, because a chain without
its front serves nobody; one of which something was written is written on. It is asked only where the daemon was left
to decide (AUTO) and found no reason to write at commit: who named a policy gets that, and a document that came back,
that is pinned, whose queries are announced or wait, or that an earlier daemon knew, is certain to come back.
"""

from __future__ import annotations

from .clock import Clock
from .document import DocumentId, WritePolicy
from .ledger import Hop
from .owners import asked
from .prices import Prices
from .residency import Tier
from .reuse import Comebacks, Decision, Stake, decide, write_price_ns
from .state import DocumentRecord, ExtentRecord, State


class Admission:
    """Reads state."""

    def __init__(self, state: State, prices: Prices, comebacks: Comebacks, clock: Clock) -> None:
        self._state = state
        self._prices = prices
        self._comebacks = comebacks
        self._clock = clock

    def refusal(self, record: ExtentRecord) -> str:
        """Why no document that needs the extent makes it worth writing, with the numbers; empty where one does."""
        why = ""
        for document in asked(record.documents):
            owner = self._state.documents[document]
            if owner.document.write_policy is WritePolicy.MEMORY:
                continue
            if not _is_open(owner) or self._is_certain(document):
                return ""
            decision = self._decided(owner)
            if decision.policy is WritePolicy.THROUGH:
                return ""
            why = f"not written: {decision.reason}"
        return why

    def _is_certain(self, document: DocumentId) -> bool:
        state = self._state
        return state.pins.get(document) is not None or document in state.awaited or document in state.hints.named

    def _decided(self, owner: DocumentRecord) -> Decision:
        document, links = owner.document, self._prices.links
        step = len(document.extents) // len(self._state.specs[document.fingerprint].groups)
        fronts = (self._state.extents[extent].extent for extent in document.extents[::step])
        size_bytes = step * sum(front.slot_bytes for front in fronts)
        recompute_ns = self._prices.prefill_ns(document.fingerprint, 0, document.token_count)
        stake = Stake(
            known=False,
            saved_ns=recompute_ns - links[Hop(Tier.NVME, Tier.DDR)].move_ns(size_bytes),
            price_ns=write_price_ns(size_bytes, links[Hop(Tier.DDR, Tier.NVME)]),
        )
        return decide([stake], self._comebacks.rate(document.id.family, self._clock.monotonic_ns()))


def _is_open(owner: DocumentRecord) -> bool:
    """Whether it is for the daemon to decide, and nothing has decided it."""
    is_auto = owner.document.write_policy is WritePolicy.AUTO
    return is_auto and owner.decision is not None and not owner.writes_through and not owner.admitted
