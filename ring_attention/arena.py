"""HBMArena: a rank's KV rows, allocated once, filled from canonical extents and saved to them.

Shapes: L layers, Hkv kv heads of this rank, R rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..kvstore.errors import InvalidRequest, InvalidSpec
from ..kvstore.geometry import Geometry, arena_geometry
from ..kvstore.layout import Copy, Span, heads_of
from ..kvstore.spec import GroupKind, KVSpec
from .moves import Buffers, Bytes, Ends, Move, moves_of
from .segment import KVSegment, span_tokens
from .staging import Staging

TORCH_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


class HBMArena:
    """`key` [L, Hkv, R, D] and `value` [L, Hkv, R, Dv] on one device; the owner assigns rows.

    Hkv are the heads that `layout.heads_of` deals to one of `tp` ranks. A latent cache (MLA) has one plane: `value` is
    then a view of the first `value_dim` dims of `key`.
    """

    def __init__(
        self,
        spec: KVSpec,
        rows: int,
        tp: int = 1,
        device: str | torch.device = "cpu",
        value_dim: int | None = None,
    ) -> None:
        """Allocate. `value_dim`, the width of the latent in a row, is for MLA only: the store need not know it.

        Raises InvalidSpec for KV other than exactly one GQA or MLA group of a plain dtype, and LayoutError for a `tp`
        over which the heads cannot be dealt, InvalidRequest where the device has no memory for the rows.
        """
        if len(spec.groups) != 1 or spec.groups[0].kind is GroupKind.SLIDING:
            kinds = ", ".join(group.kind for group in spec.groups)
            raise InvalidSpec(f"an arena holds exactly one gqa or mla layer group, not: {kinds}")
        if spec.dtype not in TORCH_DTYPES:
            raise InvalidSpec(f"unsupported KV dtype {spec.dtype!r}; use one of {', '.join(TORCH_DTYPES)}")
        group = spec.groups[0]
        self._latent = group.kind is GroupKind.MLA
        if self._latent != (value_dim is not None) or (value_dim is not None and not 0 < value_dim <= group.key_dim):
            raise InvalidSpec(f"value_dim {value_dim} does not suit a {group.kind} group with rows of {group.key_dim}")
        heads_of(0, tp, group.kv_heads)
        self.spec = spec
        self.rows = rows
        self.device = torch.device(device)
        # How extents come and go where the CPU cannot address the rows.
        self.staging = Staging(self.device) if self.device.type != "cpu" else None
        shape = arena_geometry(spec, rows, tp)
        plane = (shape.layers, shape.heads, rows)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        self.key = _zeros((*plane, group.key_dim), dtype, self.device)
        stored = [self.key] if self._latent else [self.key, _zeros((*plane, group.value_dim), dtype, self.device)]
        self.value = stored[-1][..., :value_dim]
        # The same memory as bytes: extents carry no dtype.
        self._parts = [part.view(torch.uint8) for part in stored]

    def segment(self, layer: int, row_start: int, spans: tuple[Span, ...]) -> KVSegment:
        """A view of the rows from `row_start`, which hold the tokens of `spans` in order."""
        rows = slice(row_start, row_start + span_tokens(spans))
        if self._latent:
            return KVSegment.of_latents(self.key[layer, :, rows], self.value.shape[3], spans)
        return KVSegment(self.key[layer, :, rows], self.value[layer, :, rows], spans)

    def write(self, layer: int, row_start: int, key: Tensor, value: Tensor) -> None:
        """Store key [Hkv, T, D] and value [Hkv, T, Dv] at rows from `row_start`; a latent key holds its value."""
        stop = row_start + key.shape[1]
        assert stop <= self.rows, (stop, self.rows)
        self.key[layer, :, row_start:stop] = key
        if not self._latent:
            self.value[layer, :, row_start:stop] = value

    def load(
        self, copies: Sequence[Copy], buffers: Buffers, geometry: Geometry, layer_start: int, layer_stop: int
    ) -> None:
        """Fill arena rows (the copies' target) from extents of this geometry, for layers [start, stop)."""
        moves = moves_of([Ends.loading(copy) for copy in copies])
        if self.staging is not None:
            self.staging.load(self._parts, moves, buffers, geometry, (layer_start, layer_stop))
            return
        for layer in range(layer_start, layer_stop):
            for part in range(geometry.parts):
                arena = self._parts[part][layer].numpy()
                for move, extent in zip(moves, _planes(moves, buffers, geometry, layer, part), strict=True):
                    arena[move.arena] = extent[move.extent]

    def save(
        self, copies: Sequence[Copy], buffers: Buffers, geometry: Geometry, layer_start: int, layer_stop: int
    ) -> None:
        """Fill extents of this geometry (the copies' target, writable) from arena rows, for layers [start, stop)."""
        moves = moves_of([Ends.saving(copy) for copy in copies])
        if self.staging is not None:
            self.staging.save(self._parts, moves, buffers, geometry, (layer_start, layer_stop))
            return
        for layer in range(layer_start, layer_stop):
            for part in range(geometry.parts):
                arena = self._parts[part][layer].numpy()
                for move, extent in zip(moves, _planes(moves, buffers, geometry, layer, part), strict=True):
                    extent[move.extent] = arena[move.arena]

    def forget(self, slab: memoryview) -> None:
        """The slab is about to be unmapped: pinned memory must not be."""
        if self.staging is not None:
            self.staging.unpin(slab)


def _planes(moves: Sequence[Move], buffers: Buffers, geometry: Geometry, layer: int, part: int) -> list[Bytes]:
    """Byte view [heads, rows, row bytes] of the extent's plane of each move."""
    shape = (geometry.heads, geometry.rows, geometry.row_bytes(part))
    offset, count = geometry.plane_offset(layer, part), prod(shape)
    return [np.frombuffer(buffers[move.buffer], np.uint8, count=count, offset=offset).reshape(shape) for move in moves]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU numpy makes them, because it asks for huge pages: copies into those are a fifth faster.

    Raises InvalidRequest.
    """
    size_bytes = prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu" or not size_bytes:
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.from_numpy(np.zeros(size_bytes, np.uint8)).view(dtype).view(shape)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InvalidRequest(f"{device} has no {size_bytes} B for rows of KV; ask for fewer rows per rank") from error
