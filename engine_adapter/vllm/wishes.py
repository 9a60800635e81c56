"""Wishes: what a request says in `kv_transfer_params`. What is wrong is told in its answer; the request goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

PIN_KEYS: Final = ("tier", "ttl_seconds", "owner", "reason")
KEYS: Final = ("document", "document_tokens", "pin", "store", "load")


@dataclass(frozen=True, slots=True, kw_only=True)
class PinWish:
    """A pin for the request's document, as Store.pin takes it."""

    tier: str = "ddr"
    ttl_seconds: float | None = None
    owner: str = "vllm"
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """`document` names the first `document_tokens` tokens of the prompt (None: all). `problems` says what was wrong."""

    asked: bool = False  # there were parameters: the request wants an answer
    document: str | None = None
    document_tokens: int | None = None
    pin: PinWish | None = None
    store: bool = True
    load: bool = True
    problems: list[str] = field(default_factory=list)


def wishes_of(params: object) -> Wishes:
    """What these `kv_transfer_params` ask for; what is wrong in them is left out and named."""
    if params is None:
        return Wishes()
    if not isinstance(params, Mapping):
        return Wishes(asked=True, problems=[f"kv_transfer_params is an object, not {type(params).__name__}"])
    problems: list[str] = []
    document = _document(params, problems)
    tokens = params.get("document_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        problems.append(f"document_tokens is a positive number, not {tokens!r}")
        tokens = document = None  # a longer document than was meant would be worse than none
    pin = _pin(params.get("pin"), problems)
    for name, value in (("document_tokens", tokens), ("pin", pin)):
        if value is not None and document is None:
            problems.append(f"{name} needs a document")
    return Wishes(
        asked=True,
        document=document,
        document_tokens=tokens,
        pin=pin if document is not None else None,
        store=_flag(params, "store", problems),
        load=_flag(params, "load", problems),
        problems=problems,
    )


def _document(params: Mapping[str, Any], problems: list[str]) -> str | None:
    document = params.get("document")
    if document is None or (isinstance(document, str) and document):
        return document
    problems.append(f"document is a name, not {document!r}")
    return None


def _flag(params: Mapping[str, Any], name: str, problems: list[str]) -> bool:
    value = params.get(name, True)
    if not isinstance(value, bool):
        problems.append(f"{name} is true or false, not {value!r}")
        return False  # whoever tried to forbid it meant no
    return value


def _pin(value: object, problems: list[str]) -> PinWish | None:
    if value is None or value is False:
        return None
    if value is True:
        return PinWish()
    if not isinstance(value, Mapping):
        problems.append(f"pin is true or an object of {', '.join(PIN_KEYS)}, not {value!r}")
        return None
    unknown = sorted(str(key) for key in value if key not in PIN_KEYS)
    ttl = value.get("ttl_seconds")
    texts = [value.get(name, "") for name in ("tier", "owner", "reason")]
    wrong_ttl = ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or ttl <= 0)
    if unknown or wrong_ttl or not all(isinstance(text, str) for text in texts):
        problems.append(f"pin has tier, owner and reason as texts and ttl_seconds as a number, not {dict(value)!r}")
        return None
    return PinWish(**{name: value[name] for name in PIN_KEYS if name in value})
