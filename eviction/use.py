"""Use: what policies learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UnitId = str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One chain was used as a whole, resident or not: a prompt came, a document was attached or published.

    `chain` is in order, front first, and is never changed by anybody afterwards, so a policy may keep it. It has
    `token_count` tokens; each of its units takes `unit_tokens`, and the last one may be part-filled. `now_ns` never
    goes back. `session` says whose uses belong together: a conversation's, a document's.
    """

    chain: Sequence[UnitId]
    token_count: int
    unit_tokens: int
    now_ns: int
    session: UnitId | None = None
