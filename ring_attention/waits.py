"""LayerWaits: a shard's layers are waited for when they are first read, and that time is counted."""

from __future__ import annotations

from collections.abc import Callable

from ..kvstore.clock import Clock


class LayerWaits:
    """Waits for each layer once; `exposed_ns` is the time that took: transfer that no computation hid."""

    def __init__(self, wait_layer: Callable[[int], None], clock: Clock) -> None:
        self._clock = clock
        self._wait_layer = wait_layer
        self._ready: set[int] = set()
        self.exposed_ns = 0

    def __call__(self, layer: int) -> None:
        """Return when the layer is there. Raises what the loading raises."""
        if layer in self._ready:
            return
        started = self._clock.monotonic_ns()
        self._wait_layer(layer)
        self.exposed_ns += self._clock.monotonic_ns() - started
        self._ready.add(layer)
