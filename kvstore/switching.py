"""Switching: turns the bypass on and off, and has it written down."""

from __future__ import annotations

from collections.abc import Callable

from .bypass import Bypass
from .errors import HoldfastError
from .orders import Outcome, PutBypass, Write
from .store import Store

Done = Callable[[HoldfastError | None], None]


class Switching:
    """Takes effect at once; `done` hears when a restart will know it too."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def turn_on(self, reason: str, done: Done = lambda _: None) -> Bypass:
        """From now on nobody finds, reads or stores KV, except runner groups, whose documents are their work.

        What is there stays, and whoever reads something already goes on.
        """
        state = self._store.records
        since_wall_ns = state.bypass.since_wall_ns if state.bypass is not None else self._store.clock.wall_ns()
        state.bypass = Bypass(reason=reason, since_wall_ns=since_wall_ns)
        self._put(state.bypass, done)
        return state.bypass

    def turn_off(self, done: Done = lambda _: None) -> None:
        """Serve again."""
        self._store.records.bypass = None
        self._put(None, done)

    def _put(self, bypass: Bypass | None, done: Done) -> None:
        def written(outcome: Outcome) -> None:
            done(outcome.error)

        self._store.submit(Write(id=self._store.new_id(), records=(PutBypass(bypass),)), written)
