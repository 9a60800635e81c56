"""Plans: what the scheduler side asks of the worker side in one step, and what it hears back. Values; they travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kvstore.keys import Extras
from ...kvstore.spec import KVSpec
from .wishes import PinWish

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Load:
    """Bring tokens [start, stop), whole pages, into these blocks of the engine, by KV cache group.

    `tokens` are the prompt's, from 0 to `stop` or beyond. `canonical`: they are cached in canonical form, not in pages.
    """

    request: str
    tokens: Tokens
    extras: Extras
    start: int
    stop: int
    blocks: tuple[list[int], ...]
    canonical: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Save:
    """Store all of `tokens`, whose pages are in these blocks, by KV cache group; under a name, or found by tokens.

    In pages, or in canonical form, which need not end where a page does.
    """

    request: str
    tokens: Tokens
    extras: Extras
    blocks: tuple[list[int], ...]
    canonical: bool = False
    name: str | None = None
    pin: PinWish | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step's. `stops`: requests whose blocks are taken away now, so that nobody may read or write them any more.

    `held`: requests that have ended, whose blocks the engine keeps until the worker says that their saves are over.
    `idle`: the engine computes nothing in this step.
    """

    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
    stops: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    idle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """How a load ended: tokens up to `stop` are there. `receipt` is the SwapView as plain data."""

    request: str
    stop: int
    seconds: float
    receipt: Mapping[str, Any] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """How a save ended: published, or why not; a pin's failure is told beside it."""

    request: str
    token_count: int
    seconds: float
    problem: str | None = None
    pin_problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a worker has to tell since the last step."""

    loads: tuple[Loaded, ...] = ()
    saves: tuple[Saved, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A worker's half of the layout handshake: the KV that it keeps, or why it stays away from the store.

    `canonical`: documents in canonical form are this rank's KV too. `window`: no sliding window is shorter.
    """

    spec: KVSpec | None = None
    canonical: bool = False
    window: int | None = None
    reason: str = ""
