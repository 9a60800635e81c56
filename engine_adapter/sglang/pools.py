"""Pools: pages of SGLang's host pools as bytes, read and written in place where the pool's layout allows it.

A page of a page-first pool lies in few buffers, whose bytes one after the other are the pool's flat page. Other pools
are asked for their flat pages, which copies once more.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...kvstore.errors import UnknownPageFormat
from ..objects import Gathered

IN_PLACE: Final = ("page_first", "page_first_direct", "page_head")
FACTS: Final = (
    "layout",
    "dtype",
    "page_size",
    "size_per_token",
    "layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_cache_dim",
    "head_group_num",
    "dcp_size",
    "storage_format_tag",
)

Bytes = npt.NDArray[np.uint8]


class HostPool(Protocol):
    """As much of SGLang's HostKVCache as is used here."""

    page_size: int
    layout: str

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int] | int]:
        """Addresses and sizes of the buffers of the pages whose tokens' indices these are."""
        ...

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:  # noqa: FBT001, FBT002 - theirs
        """The page whose first token's index this is."""
        ...

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Memory for a flat page."""
        ...

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Write the page whose first token's index this is."""
        ...


class Pages:
    """The pages of one pool. `indices` are of all their tokens, page after page, as SGLang gives them."""

    def __init__(self, pool: HostPool) -> None:
        """Raises UnknownPageFormat for a pool whose pages cannot be had as bytes."""
        self._pool = pool
        self._page_tokens = int(getattr(pool, "logical_page_size", 0) or getattr(pool, "page_size", 1) or 1)
        self._spare = _flat_page(pool)  # on its way into the pool; None: pages are written in place only
        self._writing = threading.Lock()
        one_page = torch.arange(self._page_tokens)
        self.size_bytes = sum(self._places(one_page)[1]) if self._spare is None else flat_bytes(self._spare).nbytes
        if not self.size_bytes:
            raise UnknownPageFormat("its pages have no bytes")
        self.tokens = self._page_tokens

    @property
    def facts(self) -> dict[str, Any]:
        """What decides what a page's bytes mean."""
        return {"pool": type(self._pool).__name__} | {
            name: str(getattr(self._pool, name)) for name in FACTS if getattr(self._pool, name, None) is not None
        }

    def fits(self, pages: int, indices: torch.Tensor | None) -> bool:
        """Whether these are the indices of so many pages."""
        return indices is not None and indices.numel() == pages * self._page_tokens

    def sources(self, indices: torch.Tensor) -> list[Bytes | Gathered]:
        """The pages' contents, flat. Raises UnknownPageFormat while the pool gives them in no form."""
        if (parts := self._parts(indices)) is not None:
            return [Gathered(page) for page in parts]
        return [flat_bytes(self._pool.get_data_page(start)) for start in self._starts(indices)]

    def write(self, indices: torch.Tensor) -> Writing:
        """Make ready to write these pages. Raises UnknownPageFormat while the pool takes them in no form."""
        return Writing(self, self._parts(indices), self._starts(indices))

    def write_flat(self, start: int, content: memoryview) -> None:
        """Write one page through the pool's own method."""
        assert self._spare is not None
        with self._writing:
            np.copyto(flat_bytes(self._spare), np.frombuffer(content, np.uint8))
            self._pool.set_from_flat_data_page(start, self._spare)

    def _starts(self, indices: torch.Tensor) -> list[int]:
        return [int(index) for index in indices[:: self._page_tokens].tolist()]

    def _parts(self, indices: torch.Tensor) -> list[list[Bytes]] | None:
        """The buffers of each page, in place; None where they do not make up its flat page.

        Raises UnknownPageFormat where there is no flat page either.
        """
        if not indices.numel():
            return None
        try:
            addresses, sizes = self._places(indices)
        except UnknownPageFormat:
            if self._spare is None:
                raise
            return None
        pages = indices.numel() // self._page_tokens
        each = len(addresses) // pages
        if len(addresses) != each * pages or sum(sizes[:each]) != self.size_bytes:
            return None
        buffers = [_at(address, size) for address, size in zip(addresses, sizes, strict=True)]
        return [buffers[first : first + each] for first in range(0, len(buffers), each)]

    def _places(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and sizes of all buffers of these pages. Raises UnknownPageFormat."""
        if getattr(self._pool, "layout", "") not in IN_PLACE:
            raise UnknownPageFormat("its pages neither are flat nor lie in few buffers")
        try:
            addresses, sizes = self._pool.get_page_buffer_meta(indices)
        except (NotImplementedError, ValueError) as error:  # as some pools say always, or of some states
            raise UnknownPageFormat(f"it gives no addresses of its pages: {error}") from error
        return addresses, [sizes] * len(addresses) if isinstance(sizes, int) else sizes


class Writing:
    """Pages that are being written, by number, whole."""

    def __init__(self, pages: Pages, parts: Sequence[Sequence[Bytes]] | None, starts: Sequence[int]) -> None:
        self._pages = pages
        self._parts = parts
        self._starts = starts

    def put(self, number: int, content: memoryview) -> None:
        """Write one page; `content` has a flat page's size."""
        if self._parts is None:
            self._pages.write_flat(self._starts[number], content)
            return
        source, offset = np.frombuffer(content, np.uint8), 0
        for part in self._parts[number]:
            np.copyto(part, source[offset : offset + part.size])
            offset += part.size


def _flat_page(pool: HostPool) -> torch.Tensor | None:
    """Memory for a flat page; None where the pool has no such form (heads of keys and of values that differ)."""
    try:
        return pool.get_dummy_flat_data_page()
    except NotImplementedError:
        return None


def flat_bytes(tensor: torch.Tensor) -> Bytes:
    """A tensor's memory, in place where it is contiguous; through uint8, because numpy has no bfloat16 and float8."""
    return np.asarray(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _at(address: int, size_bytes: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
