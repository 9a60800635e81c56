"""Moves: what to index an extent's plane and an arena's plane with, for the copies that re-sharding asks for.

The same whichever way the bytes go, and whatever the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kvstore.layout import Copy

Bytes = NDArray[np.uint8]
Buffers = Mapping[int, memoryview | Bytes]  # extents' canonical bytes by the buffer id that copies name
Rows = slice | NDArray[np.intp]
SHORT_RUN_ROWS: Final = 16


class Ends(NamedTuple):
    """A copy told as extent and arena, whichever way it goes."""

    buffer: int
    extent_head: int
    arena_head: int
    head_count: int
    extent_row: int
    arena_row: int
    row_count: int

    @classmethod
    def loading(cls, copy: Copy) -> Ends:
        heads = (copy.source_head, copy.target_head, copy.head_count)
        return cls(copy.source, *heads, copy.source_row, copy.target_row, copy.row_count)

    @classmethod
    def saving(cls, copy: Copy) -> Ends:
        heads = (copy.target_head, copy.source_head, copy.head_count)
        return cls(copy.target, *heads, copy.target_row, copy.source_row, copy.row_count)


@dataclass(frozen=True, slots=True)
class Move:
    """Rows of some heads of one extent: what to index its plane and the arena's with."""

    buffer: int
    extent: tuple[slice, Rows]
    arena: tuple[slice, Rows]


def moves_of(copies: Sequence[Ends]) -> list[Move]:
    """A move by slices per long run of rows; one by index for all short runs of an extent.

    A striped layout has a copy per token: one by one they take 15 times as long (measured).
    """
    moves: list[Move] = []
    grouped: dict[tuple[int, int, int, int], list[Ends]] = {}
    for ends in copies:
        grouped.setdefault(ends[:4], []).append(ends)
    for (buffer, extent_head, arena_head, head_count), runs in grouped.items():
        extent_heads = slice(extent_head, extent_head + head_count)
        arena_heads = slice(arena_head, arena_head + head_count)
        short = [run for run in runs if run.row_count < SHORT_RUN_ROWS]
        pairs: list[tuple[Rows, Rows]] = [
            (slice(run.extent_row, run.extent_row + run.row_count), slice(run.arena_row, run.arena_row + run.row_count))
            for run in runs
            if run.row_count >= SHORT_RUN_ROWS
        ]
        if short:
            extent_rows = np.concatenate([np.arange(run.extent_row, run.extent_row + run.row_count) for run in short])
            arena_rows = np.concatenate([np.arange(run.arena_row, run.arena_row + run.row_count) for run in short])
            pairs.append((extent_rows, arena_rows))
        moves += [Move(buffer, (extent_heads, ours), (arena_heads, theirs)) for ours, theirs in pairs]
    return moves
