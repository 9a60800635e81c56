"""HBMArena: a rank's KV rows, allocated once, filled from canonical extents and saved to them.

Shapes: L layers, Hkv kv heads of this rank, R rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kvstore.errors import InvalidSpec
from ..kvstore.geometry import Geometry, arena_geometry, extent_geometry
from ..kvstore.layout import Copy, Span
from ..kvstore.spec import GroupKind, KVSpec
from .segment import KVSegment, span_tokens

Bytes = NDArray[np.uint8]
Buffers = Mapping[int, memoryview | Bytes]  # extents' canonical bytes by the buffer id that copies name
Rows = slice | NDArray[np.intp]
SHORT_RUN_ROWS: Final = 16
TORCH_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


class HBMArena:
    """`key` [L, Hkv, R, D] and `value` [L, Hkv, R, Dv] on one device; the owner assigns rows."""

    def __init__(self, spec: KVSpec, rows: int, tp: int = 1, device: str | torch.device = "cpu") -> None:
        """Allocate. Raises InvalidSpec for KV other than exactly one GQA group of a plain dtype."""
        if len(spec.groups) != 1 or spec.groups[0].kind is not GroupKind.GQA:
            kinds = ", ".join(group.kind for group in spec.groups)
            raise InvalidSpec(f"an arena holds exactly one gqa layer group, not: {kinds}")
        if spec.dtype not in TORCH_DTYPES:
            raise InvalidSpec(f"unsupported KV dtype {spec.dtype!r}; use one of {', '.join(TORCH_DTYPES)}")
        group = spec.groups[0]
        self.spec = spec
        self.rows = rows
        self.device = torch.device(device)
        self._extent: Geometry = extent_geometry(spec)
        shape = arena_geometry(spec, rows, tp)
        plane = (shape.layers, shape.heads, rows)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        self.key = torch.zeros(*plane, group.key_dim, dtype=dtype, device=self.device)
        self.value = torch.zeros(*plane, group.value_dim, dtype=dtype, device=self.device)
        # The same memory as bytes: extents carry no dtype.
        self._parts = (self.key.view(torch.uint8), self.value.view(torch.uint8))

    def segment(self, layer: int, row_start: int, spans: tuple[Span, ...]) -> KVSegment:
        """A view of the rows from `row_start`, which hold the tokens of `spans` in order."""
        rows = slice(row_start, row_start + span_tokens(spans))
        return KVSegment(self.key[layer, :, rows], self.value[layer, :, rows], spans)

    def write(self, layer: int, row_start: int, key: Tensor, value: Tensor) -> None:
        """Store key [Hkv, T, D] and value [Hkv, T, Dv] at rows from `row_start`."""
        stop = row_start + key.shape[1]
        assert stop <= self.rows, (stop, self.rows)
        self.key[layer, :, row_start:stop] = key
        self.value[layer, :, row_start:stop] = value

    def load(self, copies: Sequence[Copy], buffers: Buffers, layer_start: int, layer_stop: int) -> None:
        """Fill arena rows (the copies' target) from extents (their source), for layers [start, stop)."""
        moves = _moves([_Ends.loading(copy) for copy in copies])
        for layer in range(layer_start, layer_stop):
            for part in range(self._extent.parts):
                rows = self._parts[part][layer]
                extents = self._planes(moves, buffers, layer, part)
                if self.device.type == "cuda":
                    _load_staged(rows, moves, extents)
                    continue
                arena = rows.numpy()
                for move, extent in zip(moves, extents, strict=True):
                    arena[move.arena] = extent[move.extent]

    def save(self, copies: Sequence[Copy], buffers: Buffers, layer_start: int, layer_stop: int) -> None:
        """Fill extents (the copies' target, writable) from arena rows (their source), for layers [start, stop)."""
        moves = _moves([_Ends.saving(copy) for copy in copies])
        for layer in range(layer_start, layer_stop):
            for part in range(self._extent.parts):
                # On CUDA the plane comes over in one copy, then rows are picked on the host.
                arena = self._parts[part][layer].cpu().numpy()
                extents = self._planes(moves, buffers, layer, part)
                for move, extent in zip(moves, extents, strict=True):
                    extent[move.extent] = arena[move.arena]

    def _planes(self, moves: Sequence[_Move], buffers: Buffers, layer: int, part: int) -> list[Bytes]:
        """Byte view [heads, rows, row bytes] of the extent's plane of each move."""
        extent = self._extent
        shape = (extent.heads, extent.rows, extent.row_bytes(part))
        offset, count = extent.plane_offset(layer, part), prod(shape)
        return [
            np.frombuffer(buffers[move.buffer], np.uint8, count=count, offset=offset).reshape(shape) for move in moves
        ]


class _Ends(NamedTuple):
    """A copy told as extent and arena, whichever way it goes."""

    buffer: int
    extent_head: int
    arena_head: int
    head_count: int
    extent_row: int
    arena_row: int
    row_count: int

    @classmethod
    def loading(cls, copy: Copy) -> _Ends:
        heads = (copy.source_head, copy.target_head, copy.head_count)
        return cls(copy.source, *heads, copy.source_row, copy.target_row, copy.row_count)

    @classmethod
    def saving(cls, copy: Copy) -> _Ends:
        heads = (copy.target_head, copy.source_head, copy.head_count)
        return cls(copy.target, *heads, copy.target_row, copy.source_row, copy.row_count)


@dataclass(frozen=True, slots=True)
class _Move:
    """Rows of some heads of one extent: what to index its plane and the arena's with."""

    buffer: int
    extent: tuple[slice, Rows]
    arena: tuple[slice, Rows]


def _moves(copies: Sequence[_Ends]) -> list[_Move]:
    """A move by slices per long run of rows; one by index for all short runs of an extent.

    A striped layout has a copy per token: one by one they take 15 times as long (measured).
    """
    moves: list[_Move] = []
    grouped: dict[tuple[int, int, int, int], list[_Ends]] = {}
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
        moves += [_Move(buffer, (extent_heads, ours), (arena_heads, theirs)) for ours, theirs in pairs]
    return moves


def _load_staged(arena: Tensor, moves: Sequence[_Move], extents: Sequence[Bytes]) -> None:
    """One host-to-device copy of all moves, then a scatter on the device. Not yet run on a GPU."""
    blocks = [extent[move.extent] for move, extent in zip(moves, extents, strict=True)]
    host = torch.empty(sum(block.size for block in blocks), dtype=torch.uint8, pin_memory=arena.is_cuda)
    offset = 0
    for block in blocks:
        np.copyto(host[offset : offset + block.size].numpy().reshape(block.shape), block)
        offset += block.size
    staged = host.to(arena.device)
    offset = 0
    for move, block in zip(moves, blocks, strict=True):
        heads, rows = move.arena
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(arena.device)
        arena[heads, index] = staged[offset : offset + block.size].view(block.shape)
        offset += block.size
