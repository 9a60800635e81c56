"""Attachment: a leased document, layer by layer, as views of shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import overload

import numpy as np

from ..kvstore.client import Client
from ..kvstore.errors import InvalidRequest, Unavailable
from ..kvstore.views import SwapView
from ..kvstore.wire import Attached
from .pages import Array
from .planes import Planes


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens [start, start + n) of one layer: `key` and `value` are views of shared memory.

    They may be read until the attachment ends. MLA has no `value` (an empty array). Of native pages they are copies.
    """

    start: int
    key: Array
    value: Array


class _Pieces(Sequence[Piece]):
    """The extents of one layer of some runs, as far as they hold these tokens."""

    def __init__(self, planes: Sequence[Planes], position: int, tokens: tuple[int, int]) -> None:
        self._planes = planes
        self._position = position
        self._tokens = tokens

    def __len__(self) -> int:
        return sum(planes.run.count for planes in self._planes)

    def __iter__(self) -> Iterator[Piece]:
        return (self._piece(planes, index) for planes in self._planes for index in range(planes.run.count))

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> list[Piece]: ...

    def __getitem__(self, index: int | slice) -> Piece | list[Piece]:
        if isinstance(index, slice):
            return list(self)[index]
        left = range(len(self))[index]  # raises IndexError
        for planes in self._planes:
            if left < planes.run.count:
                return self._piece(planes, left)
            left -= planes.run.count
        raise AssertionError(index)

    def _piece(self, planes: Planes, index: int) -> Piece:
        cut = planes.clipped(index, *self._tokens)
        key, value = (planes.of_cut(part, self._position, cut) for part in (0, 1))
        return Piece(cut.start, key, value)


class LayerKV:
    """One layer of an attached document, in token order. `index` is the model's layer index.

    `tokens` is the range [start, stop) that it holds: the whole document, or what was attached of it.
    """

    def __init__(self, index: int, planes: Sequence[Planes], position: int, tokens: tuple[int, int]) -> None:
        self.index = index
        self.tokens = tokens
        self._planes = planes
        self._position = position

    @property
    def pieces(self) -> Sequence[Piece]:
        """What it consists of, one piece per extent, made when it is looked at: no copy, but of native pages."""
        return _Pieces(self._planes, self._position, self.tokens)

    def gathered(self) -> tuple[Array, Array]:
        """Key and value of all tokens, copied into one array each: [kv heads, tokens, dim]."""
        start, stop = self.tokens
        planes = self._planes[0]
        key, value = (np.empty((heads, stop - start, dim), planes.dtype) for heads, dim in planes.shapes)
        self.copy_into(key, value)
        return key, value

    def copy_into(self, key: Array, value: Array) -> None:
        """Copy key and value of all tokens into the caller's arrays: [kv heads, tokens, dim], of the model's dtype.

        Raises InvalidRequest for arrays of another shape or dtype, and copies nothing.
        """
        start, stop = self.tokens
        dtype = self._planes[0].dtype
        for array, (heads, dim) in zip((key, value), self._planes[0].shapes, strict=True):
            if array.shape != (heads, stop - start, dim) or array.dtype != dtype:
                raise InvalidRequest(f"{array.dtype} {array.shape} is no room for {dtype} {(heads, stop - start, dim)}")
        for planes in self._planes:
            for cut in planes.cuts(start, stop):
                for part, array in enumerate((key, value)):
                    rows = array[:, cut.start - start : cut.stop - start]
                    for ours, theirs in planes.beside(part, self._position, cut, rows):
                        np.copyto(theirs, ours)

    def pages(self, start: int = 0, stop: int | None = None) -> list[tuple[int, Array]]:
        """A native document's pages as they were stored: those that hold any of tokens [start, stop); by default all.

        In order, in as few pieces as can be: (number of the first page, uint8 view [extents, pages of each, page
        bytes]), no copy. Raises InvalidRequest for canonical KV.
        """
        start, stop = max(start, self.tokens[0]), min(self.tokens[1] if stop is None else stop, self.tokens[1])
        return [found for planes in self._planes for found in planes.native_pages(self._position, start, stop)]


class Attachment:
    """A leased document. Layers become readable one after the other, while later ones are still on their way.

    `tokens` is what of it is leased, [start, stop): all of it unless a range, or a prefix, was asked for. `document` is
    its name.
    """

    def __init__(self, client: Client, attached: Attached, tokens: tuple[int, int] | None = None) -> None:
        self._client = client
        self._attached = attached
        self.spec = attached.spec
        self.document = attached.document
        self.token_count = attached.token_count
        self.tokens = tokens if tokens is not None else (0, attached.token_count)

    def detach(self) -> None:
        """Give it back. Its arrays must not be used any more."""
        with suppress(Unavailable):  # a daemon that is gone holds no lease
            self._client.detach(self._attached.lease)

    def report(
        self,
        *,
        exposed_ns: int,
        prefill_ns: int = 0,
        decode_ns: int = 0,
        answer_tokens: int = 0,
        queries: int = 1,
    ) -> SwapView:
        """Tell how long the engine really waited for it, what it did then, and how many queries it served.

        Returns the receipt.
        """
        return self._client.report(
            self._attached.lease,
            exposed_ns=exposed_ns,
            prefill_ns=prefill_ns,
            decode_ns=decode_ns,
            answer_tokens=answer_tokens,
            queries=queries,
        )

    def layers(self, *, deadline_seconds: float = 600.0) -> Iterator[LayerKV]:
        """Every layer, in order, each as soon as it may be read; no copy.

        Raises CorruptExtent or StorageFailed for what cannot be read, DeadlineExceeded when one layer takes longer.
        """
        planes = self._planes()
        # Layer groups of one model are stored side by side; the k-th layers of all of them come together.
        depth = max(len(group.layers) for group in self.spec.groups)
        for position in range(depth):
            self._client.wait_layers(self._attached.lease, position + 1, deadline_seconds)
            for number, group in enumerate(self.spec.groups):
                if position < len(group.layers):
                    yield LayerKV(group.layers[position], planes[number], position, self.tokens)

    def _planes(self) -> list[list[Planes]]:
        """The runs of every layer group, in token order, as arrays."""
        runs = self._attached.runs
        views = self._client.views(runs)
        found: list[list[Planes]] = [[] for _ in self.spec.groups]
        for run, view in zip(runs, views, strict=True):
            # Sealed: whoever writes here corrupts everybody's copy.
            found[run.group].append(Planes(run, self.spec, view.toreadonly()))
        return found
