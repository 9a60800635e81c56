"""WorkerSide: carries the scheduler side's plans out beside the engine's forward passes, and says how each ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from ..api import Store
from ..link import Link
from .caches import Caches
from .loading import load, nothing
from .plans import Heard, Load, Loaded, Plan, Save, Saved
from .saving import dropped, save
from .settings import Settings
from .tasks import Task, Tasks

LOADS_AT_ONCE: Final = 2  # one reads from the disk while the other copies
LOADS_MAX: Final = 1024  # the engine's blocks limit them first
SAVES_MAX: Final = 16  # waiting; more would pin the engine's blocks for a store that does not follow


@dataclass(slots=True)
class Ended:
    """What the engine is to be told: transfers that are over, and blocks whose tokens did not come, by request.

    `failed`: requests of which nothing that was loaded can be used.
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    missing: dict[str, list[int]] = field(default_factory=dict)


class WorkerSide:
    """One rank's. Its methods are called on the engine's thread, and never wait for the daemon.

    `connect` makes a Store; loads and saves have connections of their own, so that neither waits behind the other.
    """

    def __init__(
        self,
        settings: Settings,
        caches: Caches,
        connect: Callable[[], Store],
        part: str = "",
        *,
        whole: bool = False,
    ) -> None:
        """`whole`: the engine can use no load of which something is missing.

        One that slides a window has blocks for the end of what was promised only. Where less came, what its last tokens
        would look at was never loaded.
        """
        self._settings = settings
        self._whole = whole
        self._caches = caches
        self._part = part  # behind the names of this rank's documents
        self._load_link = Link(connect)
        self._save_link = Link(connect)
        self._news = threading.Event()  # something has ended
        self._loads: Tasks[Loaded] = Tasks(
            "load", threads=LOADS_AT_ONCE, limit=LOADS_MAX, seconds=settings.load_seconds, news=self._news
        )
        self._saves: Tasks[Saved] = Tasks("save", threads=1, limit=SAVES_MAX, seconds=settings.save_seconds)
        self._orders: dict[str, Load] = {}
        self._held: dict[str, float] = {}  # since when
        self._heard_loads: list[Loaded] = []

    def take_back(self, plan: Plan) -> None:
        """Blocks that are taken away: nothing touches them when this returns. Before the engine's forward pass."""
        for request in plan.stops:
            self._loads.stop(request, "the request ended")
            self._saves.stop(request, "its blocks were taken away")

    def start_loads(self, plan: Plan) -> None:
        """Begin what the plan wants loaded."""
        fence = self._caches.fence() if plan.loads else None
        for order in plan.loads:
            self._orders[order.request] = order
            work = partial(load, order, self._load_link, self._caches, seconds=self._settings.load_seconds)
            self._loads.start(Task(order.request, work, partial(nothing, order), fence))

    def start_saves(self, plan: Plan) -> None:
        """Begin what the plan wants saved: after the forward pass that has filled the blocks."""
        fence = self._caches.fence() if plan.saves else None
        for order in plan.saves:
            self._start_save(order, fence)
        now = time.monotonic()
        self._held |= dict.fromkeys(plan.held, now)

    def _start_save(self, order: Save, fence: Callable[[], None] | None) -> None:
        named = order if order.name is None else replace(order, name=order.name + self._part)
        policy, seconds = self._settings.write_policy, self._settings.save_seconds
        work = partial(save, named, self._save_link, self._caches, write_policy=policy, seconds=seconds)
        self._saves.start(Task(order.request, work, partial(dropped, order), fence))

    def ended(self, wait_seconds: float = 0.0) -> Ended:
        """What is over since the last call. While nothing is that the engine waits for, it may wait here so long.

        An engine with nothing to compute asks without end, and would take the cores from the copies that it waits for.
        """
        if wait_seconds and (self._orders or self._held):
            self._news.wait(wait_seconds)
        self._news.clear()
        found = Ended()
        for ended in self._loads.take():
            result, order = ended, self._orders.pop(ended.request)
            found.received.add(order.request)
            if result.stop < order.stop and self._whole:
                found.failed.add(order.request)
                result = replace(result, stop=order.start)
            elif result.stop < order.stop:
                found.missing[order.request] = self._missing(order, result.stop)
            self._heard_loads.append(result)
        overdue = time.monotonic() - self._settings.hold_seconds
        for request, since in list(self._held.items()):
            if since < overdue:
                self._saves.stop(request, f"not within {self._settings.hold_seconds:g} s of its request's end")
            if not self._saves.needs_blocks(request):
                del self._held[request]
                found.sent.add(request)
        return found

    def _missing(self, order: Load, stop: int) -> list[int]:
        """The engine's blocks of tokens [stop, order.stop)."""
        first = (stop - order.start) // self._caches.page_tokens
        return [block for table in order.blocks for block in table[first:]]

    def heard(self) -> Heard | None:
        """What the scheduler side is to be told."""
        loads, self._heard_loads = tuple(self._heard_loads), []
        saves = tuple(self._saves.take())
        return Heard(loads=loads, saves=saves) if loads or saves else None

    def close(self) -> None:
        """Stop everything and disconnect."""
        self._loads.close()
        self._saves.close()
        self._load_link.close()
        self._save_link.close()
