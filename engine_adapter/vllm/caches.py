"""Caches: the engine's page tensors, as rows of bytes, and copies between them and shared memory.

On a CPU pages are numpy's, because its copies do not hold the interpreter's lock; runs of neighbouring blocks, which
engines hand out mostly, are one copy each. On a device they are gathered there first, and cross the bus in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ...kvstore.errors import InvalidSpec
from ...kvstore.spec import KVSpec
from ..pages import Array, key_value, page_format
from ..planes import NUMPY_DTYPES

Blocks = npt.NDArray[np.int64]
NULL_BLOCK: Final = 0  # stands in tables where a sliding window has passed; nobody's tokens are there


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages: [blocks, page bytes], and the KV cache group whose table names them."""

    group: int
    pages: Array | torch.Tensor


class Caches:
    """All layers of one rank, by the model's layer index. Pages that the spec's format describes can be decoded."""

    def __init__(self, spec: KVSpec, layers: Mapping[int, tuple[int, torch.Tensor]]) -> None:
        """`layers`: by layer index, the KV cache group and the engine's tensor [blocks, ...].

        Raises InvalidSpec for tensors whose pages are not the format's.
        """
        self.spec = spec
        self.page_tokens = spec.block_tokens
        page_bytes = spec.page_bytes()
        self.layers = {index: LayerCache(group, _rows(tensor, page_bytes)) for index, (group, tensor) in layers.items()}
        if set(self.layers) != {layer for group in spec.groups for layer in group.layers}:
            raise InvalidSpec("the engine's layers are not those of its spec")

    def fence(self) -> Callable[[], None]:
        """Called on the engine's thread: what is returned waits until the work that it has given to its device is done.

        Blocks may be copied from another thread only then. On a CPU that is at once.
        """
        first = next(iter(self.layers.values())).pages
        if not isinstance(first, torch.Tensor):
            return lambda: None
        event = torch.Event(first.device)
        event.record(torch.accelerator.current_stream(first.device))
        waited: Callable[[], None] = event.synchronize
        return waited

    def put(self, layer: int, blocks: Blocks, pages: Array) -> None:
        """Copy n pages, [extents, pages of each, page bytes], into n blocks of a layer."""
        target = self.layers[layer].pages
        if isinstance(target, torch.Tensor):
            kept = blocks != NULL_BLOCK
            rows = torch.from_numpy(pages.reshape(len(blocks), -1)[kept]).to(target.device)
            target.index_copy_(0, torch.from_numpy(blocks[kept]).to(target.device), rows)
            torch.accelerator.current_stream(target.device).synchronize()
            return
        for first, run in runs(blocks):
            if run[0] != NULL_BLOCK:
                for ours, theirs in _beside(pages, first, target[run[0] : run[-1] + 1]):
                    np.copyto(theirs, ours)

    def take(self, layer: int, blocks: Blocks, pages: Array) -> None:
        """Copy n blocks of a layer into `pages`, [n, page bytes]."""
        source = self.layers[layer].pages
        if isinstance(source, torch.Tensor):
            found = source.index_select(0, torch.from_numpy(blocks).to(source.device))
            np.copyto(pages, found.cpu().numpy())
            return
        for first, run in runs(blocks):
            np.copyto(pages[first : first + len(run)], source[run[0] : run[-1] + 1])

    def encode(self, layer: int, blocks: Blocks, key: Array, value: Array) -> None:
        """Write keys and values of n whole pages, [heads, n x tokens, dim], into n blocks of a layer."""
        count, tokens = len(blocks), self.page_tokens
        rows = self._rows(count)
        for view, array in zip(key_value(page_format(self.spec), rows), (key, value), strict=True):
            heads, _, dim = array.shape
            np.copyto(view, array.reshape(heads, count, tokens, dim).transpose(1, 0, 2, 3))
        self.put(layer, blocks, rows.view(np.uint8)[None])

    def decode(self, layer: int, blocks: Blocks) -> tuple[Array, Array]:
        """Keys and values of n blocks of a layer, [heads, n x tokens, dim]: copies."""
        rows = self._rows(len(blocks))
        self.take(layer, blocks, rows.view(np.uint8))
        key, value = (
            view.transpose(1, 0, 2, 3).reshape(view.shape[1], len(blocks) * self.page_tokens, view.shape[3])
            for view in key_value(page_format(self.spec), rows)
        )
        return key, value

    def _rows(self, count: int) -> Array:
        return np.empty((count, self.spec.page_bytes() // self.spec.element_bytes), NUMPY_DTYPES[self.spec.dtype])

    def group_of(self, layer: int) -> int:
        """The KV cache group whose table names a layer's blocks."""
        return self.layers[layer].group


def runs(blocks: Blocks) -> Iterator[tuple[int, Sequence[int]]]:
    """Neighbouring blocks together, as (place of the first, block numbers); null blocks by themselves."""
    joins = (np.diff(blocks) == 1) & (blocks[:-1] != NULL_BLOCK)
    starts = [0, *(np.flatnonzero(~joins) + 1).tolist(), len(blocks)]
    for start, stop in pairwise(starts):
        if stop > start:
            yield start, range(int(blocks[start]), int(blocks[stop - 1]) + 1)


def _beside(pages: Array, first: int, rows: Array) -> Iterator[tuple[Array, Array]]:
    """Pairs of equal views, as few as can be: of pages from number `first` on, and of rows [n, page bytes]."""
    each = pages.shape[1]
    while len(rows):
        extent, page = divmod(first, each)
        whole = len(rows) // each if not page else 0
        count = whole * each or min(each - page, len(rows))
        if whole:
            yield pages[extent : extent + whole], rows[:count].reshape(whole, each, -1)
        else:
            yield pages[extent, page : page + count], rows[:count]
        first, rows = first + count, rows[count:]


def _rows(tensor: torch.Tensor, page_bytes: int) -> Any:
    """A view of [blocks, ...] as [blocks, page bytes]. Raises InvalidSpec where a page is not one piece."""
    element_bytes = tensor.element_size()
    inner = tensor[0]
    span = 1 + sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True))
    if span != inner.numel() or inner.numel() * element_bytes != page_bytes:
        raise InvalidSpec(
            f"a page of the engine, {tuple(inner.shape)} of {tensor.dtype} with strides {inner.stride()}, is not one "
            f"piece of {page_bytes} bytes"
        )
    rows = tensor.as_strided((tensor.shape[0], inner.numel()), (tensor.stride(0), 1)).view(torch.uint8)
    return rows.numpy() if rows.device.type == "cpu" else rows
