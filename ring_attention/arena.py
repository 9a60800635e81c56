"""HBMArena: a rank's KV rows, allocated once, filled from canonical extents and saved to them.

Shapes: L layers, Hkv kv heads of this rank, R rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Final, TypeVar

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
        sources = {copy.source for copy in copies}
        for layer in range(layer_start, layer_stop):
            moves = []
            for part in range(self._extent.parts):
                planes = {buffer: self._plane(buffers[buffer], layer, part) for buffer in sources}
                for copy in copies:
                    rows = _block(self._parts[part][layer], copy.target_head, copy.target_row, copy)
                    source = _block(planes[copy.source], copy.source_head, copy.source_row, copy)
                    moves.append((rows, source))
            if self.device.type == "cuda":
                _load_staged(moves)
            else:
                for rows, source in moves:
                    np.copyto(rows.numpy(), source)

    def save(self, copies: Sequence[Copy], buffers: Buffers, layer_start: int, layer_stop: int) -> None:
        """Fill extents (the copies' target, writable) from arena rows (their source), for layers [start, stop)."""
        targets = {copy.target for copy in copies}
        for layer in range(layer_start, layer_stop):
            for part in range(self._extent.parts):
                # On CUDA the plane comes over in one copy, then rows are picked on the host.
                plane = self._parts[part][layer].cpu()
                planes = {buffer: self._plane(buffers[buffer], layer, part) for buffer in targets}
                for copy in copies:
                    rows = _block(plane, copy.source_head, copy.source_row, copy)
                    target = _block(planes[copy.target], copy.target_head, copy.target_row, copy)
                    np.copyto(target, rows.numpy())

    def _plane(self, buffer: memoryview | Bytes, layer: int, part: int) -> Bytes:
        """Byte view [heads, rows, row bytes] of a plane of an extent."""
        extent = self._extent
        shape = (extent.heads, extent.rows, extent.row_bytes(part))
        offset = extent.plane_offset(layer, part)
        return np.frombuffer(buffer, np.uint8, count=prod(shape), offset=offset).reshape(shape)


Plane = TypeVar("Plane", Tensor, Bytes)


def _block(plane: Plane, head: int, row: int, copy: Copy) -> Plane:
    """The heads and rows of one side of a copy, as a view."""
    return plane[head : head + copy.head_count, row : row + copy.row_count]


def _load_staged(moves: Sequence[tuple[Tensor, Bytes]]) -> None:
    """One host-to-device copy of all, then a scatter on the device. Not yet run on a GPU."""
    if not moves:
        return
    total = sum(source.size for _, source in moves)
    host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    offset = 0
    for _, source in moves:
        np.copyto(host[offset : offset + source.size].numpy().reshape(source.shape), source)
        offset += source.size
    staged = host.to(moves[0][0].device)
    offset = 0
    for target, source in moves:
        target.copy_(staged[offset : offset + source.size].view(target.shape))
        offset += source.size
