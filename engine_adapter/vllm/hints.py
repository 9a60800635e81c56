"""Hints: what a request's `kv_hints` envelope asks of the tier. vLLM has no channel for an answer: answers are counted.

    {"protocol_version": "1", "message_id": "m", "actions": [{"action_id": "a", "action_type": "pin",
        "action_version": "1", "payload": {"ttl_seconds": 3600, "owner": "me"}}]}

A pin keeps what the request finds or stores in the cache for `ttl_seconds`. It always ends: who has no name for what
was pinned could not end it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

PIN: Final = "pin"
VERSIONS: Final = ("1", "1.0")
TTL_SECONDS: Final = 3600.0


class Answer(StrEnum):
    """What became of an action."""

    ACCEPTED = "accepted"
    CLIPPED = "clipped"  # done for a shorter time than was asked for
    REFUSED = "refused"  # its payload says nothing that can be done
    UNKNOWN = "unknown"  # another type or version


class Action(Protocol):
    """vLLM's KvHintAction."""

    action_id: str
    action_type: str
    action_version: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PinHint:
    """For how long, for whom and why."""

    ttl_seconds: float
    owner: str = "vllm"
    reason: str = ""


def read(actions: Iterable[Action], ttl_max_seconds: float) -> tuple[PinHint | None, list[Answer]]:
    """The longest pin that is asked for, at most so long, and an answer for each action."""
    pin: PinHint | None = None
    answers = []
    for action in actions:
        found, answer = _one(action, ttl_max_seconds)
        answers.append(answer)
        if found is not None and (pin is None or found.ttl_seconds > pin.ttl_seconds):
            pin = found
    return pin, answers


def _one(action: Action, ttl_max_seconds: float) -> tuple[PinHint | None, Answer]:
    if action.action_type != PIN or action.action_version not in VERSIONS:
        return None, Answer.UNKNOWN
    wanted = action.payload.get("ttl_seconds", TTL_SECONDS)
    owner, reason = action.payload.get("owner", "vllm"), action.payload.get("reason", action.action_id)
    number = isinstance(wanted, int | float) and not isinstance(wanted, bool) and wanted > 0
    if not number or not isinstance(owner, str) or not isinstance(reason, str):
        return None, Answer.REFUSED
    pin = PinHint(ttl_seconds=min(wanted, ttl_max_seconds), owner=owner, reason=reason)
    return pin, Answer.ACCEPTED if wanted <= ttl_max_seconds else Answer.CLIPPED
