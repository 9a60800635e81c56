"""Measure: how fast a rank's arena is filled from DDR and saved to it, on the device that would serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..kvstore.clock import Clock
from ..kvstore.geometry import extent_geometry
from ..kvstore.layout import Span, contiguous, copies, extent_holding, shard_holding
from ..kvstore.spec import KVSpec
from .arena import HBMArena

FEW_TOKENS = 8  # of one layer: the smallest move worth timing


def best_device() -> str:
    """The kind of memory that HBM is here: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class HbmMeasurement:
    """An arena with room for `buffers`: extents of `spec`, full, one after the other."""

    def __init__(self, spec: KVSpec, buffers: Sequence[memoryview], device: str, clock: Clock) -> None:
        heads, tokens = spec.groups[0].kv_heads, spec.extent_tokens
        self._buffers = dict(enumerate(buffers))
        self._layers = len(spec.groups[0].layers)
        self._extent = extent_geometry(spec)
        self._device = device
        self._clock = clock
        self._arena = HBMArena(spec, tokens * len(buffers), device=device)
        held = [extent_holding(number, number * tokens, tokens, heads) for number in self._buffers]
        shard = shard_holding(contiguous(tokens * len(buffers), 1), 0, heads)
        self._loads = list(copies(held, [shard]))
        self._saves = list(copies([shard], held))
        few = replace(shard, spans=(Span(0, FEW_TOKENS, 0),))
        self._small = list(copies(held[:1], [few]))

    def load(self) -> int:
        """Nanoseconds of bringing every extent into the arena."""
        started_ns = self._clock.monotonic_ns()
        self._arena.load(self._loads, self._buffers, self._extent, 0, self._layers)
        return self._ended(started_ns)

    def save(self) -> int:
        """Nanoseconds of saving every extent out of it."""
        started_ns = self._clock.monotonic_ns()
        self._arena.save(self._saves, self._buffers, self._extent, 0, self._layers)
        return self._ended(started_ns)

    def load_few(self) -> int:
        """Nanoseconds of one move so small that only its latency counts."""
        started_ns = self._clock.monotonic_ns()
        self._arena.load(self._small, self._buffers, self._extent, 0, 1)
        return self._ended(started_ns)

    def _ended(self, started_ns: int) -> int:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self._clock.monotonic_ns() - started_ns
