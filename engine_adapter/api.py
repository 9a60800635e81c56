"""The small Python API: `holdfast.connect`, documents, ingest and attach as context managers, layer by layer.

For engines and scripts that hold KV as arrays and have no ranks of their own. Arrays are numpy, [kv heads, tokens,
dim]; dtypes that numpy lacks travel as their bits (bfloat16 as uint16, float8 as uint8).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from ..kvstore.client import Client
from ..kvstore.config import load_config
from ..kvstore.document import WritePolicy
from ..kvstore.errors import HoldfastError, InvalidRequest, Unavailable
from ..kvstore.geometry import Geometry, extent_geometry
from ..kvstore.spec import KVSpec
from ..kvstore.views import DocumentView, PinView, TierView, VictimView
from ..kvstore.wire import Attached, IngestOpened

Array = npt.NDArray[Any]
NUMPY_DTYPES: Final = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
}


def connect(socket: str | Path | None = None, *, data_dir: str | Path | None = None, tenant: str = "default") -> Store:
    """Connect to a daemon on this machine: by its socket, its data directory, or where the defaults put it.

    Raises DaemonUnavailable.
    """
    if socket is None:
        overrides = {} if data_dir is None else {"daemon.data_dir": str(data_dir)}
        socket = load_config(None, os.environ, overrides).daemon.socket
    return Store(Client(Path(socket), tenant))


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens [start, start + n) of one layer: `key` and `value` are views of shared memory.

    They may be read until the attachment ends. MLA has no `value` (an empty array).
    """

    start: int
    key: Array
    value: Array


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer of an attached document, in token order. `index` is the model's layer index."""

    index: int
    pieces: tuple[Piece, ...]

    def gathered(self) -> tuple[Array, Array]:
        """Key and value of all tokens, copied into one array each: [kv heads, tokens, dim]."""
        keys = np.concatenate([piece.key for piece in self.pieces], axis=1)
        return keys, np.concatenate([piece.value for piece in self.pieces], axis=1)


class Attachment:
    """A leased document. Layers become readable one after the other, while later ones are still on their way."""

    def __init__(self, client: Client, attached: Attached) -> None:
        self._client = client
        self._attached = attached
        self.spec = attached.spec
        self.token_count = attached.token_count

    def layers(self) -> Iterator[LayerKV]:
        """Every layer, in order, each as soon as it may be read; no copy. Raises CorruptExtent or StorageFailed."""
        # Layer groups of one model are stored side by side; the k-th layers of all of them come together.
        depth = max(len(group.layers) for group in self.spec.groups)
        for position in range(depth):
            self._client.wait_layers(self._attached.lease, position + 1)
            for number, group in enumerate(self.spec.groups):
                if position < len(group.layers):
                    yield self._layer(number, position)

    def _layer(self, group: int, position: int) -> LayerKV:
        geometry = extent_geometry(self.spec, group)
        parts = sorted((p for p in self._attached.parts if p.group == group), key=lambda part: part.start)
        pieces = []
        for part in parts:
            view = self._client.view(part)
            planes = [plane(view, geometry, self.spec, position, which)[:, : part.valid_tokens] for which in (0, 1)]
            for array in planes:
                array.flags.writeable = False  # sealed: whoever writes here corrupts everybody's copy
            pieces.append(Piece(part.start, *planes))
        return LayerKV(self.spec.groups[group].layers[position], tuple(pieces))


def plane(view: memoryview, geometry: Geometry, spec: KVSpec, layer: int, part: int) -> Array:
    """The key (0) or value (1) plane of one layer of an extent: [kv heads, capacity, dim], without a copy."""
    dtype = np.dtype(NUMPY_DTYPES[spec.dtype])
    dim = geometry.row_bytes(part) // dtype.itemsize
    shape = (geometry.heads, geometry.rows, dim)
    if not dim:
        return np.empty(shape, dtype)
    offset = geometry.plane_offset(layer, part)
    return np.frombuffer(view, dtype, count=geometry.heads * geometry.rows * dim, offset=offset).reshape(shape)


class IngestWriter:
    """An open ingest: write the KV of every missing token of every layer, then leave the `with` block to publish."""

    def __init__(self, client: Client, spec: KVSpec, opened: IngestOpened, token_count: int) -> None:
        self._client = client
        self._spec = spec
        self._token_count = token_count
        self._released = False
        self._opened = opened
        self._views = [client.view(part) for part in opened.parts]
        layers = [len(spec.groups[part.group].layers) for part in opened.parts]
        self._written = [
            np.zeros((count, part.valid_tokens), dtype=bool) for count, part in zip(layers, opened.parts, strict=True)
        ]
        self._places = {
            layer: (number, position)
            for number, group in enumerate(spec.groups)
            for position, layer in enumerate(group.layers)
        }

    @property
    def cached_tokens(self) -> int:
        """Leading tokens whose KV the store has already."""
        return self._opened.cached_tokens

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Token ranges [start, stop) to write, in order."""
        return sorted({(part.start, part.start + part.valid_tokens) for part in self._opened.parts})

    def write(self, layer: int, start: int, key: Array, value: Array) -> None:
        """Store one layer's KV of tokens [start, start + n): [kv heads, n, dim]. What is stored already is skipped.

        Raises InvalidRequest when the layer, the shape or the dtype is not the model's, when the tokens are not the
        document's, and when the block has ended.
        """
        if self._released:
            raise InvalidRequest("this ingest has ended; write inside its block")
        if layer not in self._places:
            raise InvalidRequest(f"layer {layer} is not in this model")
        number, position = self._places[layer]
        self._check(number, key, value)
        stop = start + key.shape[1]
        if not 0 <= start <= stop <= self._token_count:
            raise InvalidRequest(f"tokens [{start}, {stop}) are not in this document of {self._token_count} tokens")
        geometry = extent_geometry(self._spec, number)
        for part, view, written in zip(self._opened.parts, self._views, self._written, strict=True):
            low, high = max(start, part.start), min(stop, part.start + part.valid_tokens)
            if part.group != number or low >= high:
                continue
            rows = slice(low - part.start, high - part.start)
            for which, array in enumerate((key, value)):
                plane(view, geometry, self._spec, position, which)[:, rows] = array[:, low - start : high - start]
            written[position, rows] = True

    def _check(self, number: int, key: Array, value: Array) -> None:
        group = self._spec.groups[number]
        dtype = np.dtype(NUMPY_DTYPES[self._spec.dtype])
        for name, array, dim in (("key", key, group.key_dim), ("value", value, group.value_dim)):
            if not isinstance(array, np.ndarray):
                raise InvalidRequest(
                    f"{name} is no numpy array but {type(array).__module__}.{type(array).__qualname__}"
                )
            tokens = key.shape[1] if key.ndim == 3 else "tokens"
            if array.shape != (group.kv_heads, tokens, dim) or array.dtype != dtype:
                wanted = f"{dtype} ({group.kv_heads}, {tokens}, {dim})"
                raise InvalidRequest(f"{name} is {array.dtype} {array.shape}; this model has {wanted}")

    def check_complete(self) -> None:
        """Raises InvalidRequest, naming what is missing, unless every token of every layer was written."""
        for part, written in zip(self._opened.parts, self._written, strict=True):
            if not written.all():
                layer, row = (int(index) for index in np.argwhere(~written)[0])
                index = self._spec.groups[part.group].layers[layer]
                raise InvalidRequest(f"layer {index}: token {part.start + row} was never written; nothing is published")

    def release(self) -> None:
        """Let go of the shared memory."""
        self._released = True
        self._views.clear()


class Store:
    """A connection to a daemon, for one tenant. Use as a context manager, or call `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every claim and disconnect."""
        self._client.close()

    @contextmanager
    def ingest(
        self,
        name: str,
        spec: KVSpec,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        *,
        write_policy: WritePolicy = WritePolicy.THROUGH,
        deadline_seconds: float = 60.0,
    ) -> Iterator[IngestWriter]:
        """Store a document: write what is missing inside the block; leaving it publishes, an error leaves no trace."""
        if getattr(tokens, "ndim", 1) != 1:
            raise InvalidRequest(f"tokens are one row of token ids, not an array of shape {np.shape(tokens)}")
        fingerprint = self._client.register_spec(spec)
        opened = self._client.begin_ingest(
            name, fingerprint, tokens, write_policy=write_policy, deadline_seconds=deadline_seconds
        )
        published = False
        try:
            writer = IngestWriter(self._client, spec, opened, len(tokens))
            yield writer
            writer.check_complete()
            writer.release()
            self._client.commit_ingest(opened.ingest)
            published = True
        finally:
            if not published:
                with suppress(HoldfastError):
                    self._client.abort_ingest(opened.ingest)

    @contextmanager
    def attach(self, name: str, *, spec: KVSpec | None = None, deadline_seconds: float = 60.0) -> Iterator[Attachment]:
        """Lease a document and read it. With `spec`, KV of any other model is refused (SpecMismatch)."""
        fingerprint = spec.fingerprint() if spec is not None else None
        attached = self._client.attach(name, fingerprint=fingerprint, deadline_seconds=deadline_seconds)
        try:
            yield Attachment(self._client, attached)
        finally:
            with suppress(Unavailable):  # a daemon that is gone holds no lease
                self._client.detach(attached.lease)

    def documents(self) -> list[DocumentView]:
        """The tenant's documents, by name."""
        return self._client.documents()

    def document(self, name: str) -> DocumentView:
        """One document. Raises DocumentNotFound."""
        return self._client.document(name)

    def pin(
        self, name: str, tier: str = "ddr", *, ttl_seconds: float | None = None, owner: str = "", reason: str = ""
    ) -> PinView:
        """Keep a document at or above a tier. Raises PinsOvercommitted."""
        return self._client.pin(name, tier, ttl_seconds=ttl_seconds, owner=owner, reason=reason)

    def unpin(self, name: str) -> PinView:
        """Let it sink again."""
        return self._client.unpin(name)

    def evict(self, name: str, tier: str = "ddr") -> list[VictimView]:
        """Take a document out of `tier` and all nearer ones; returns when it has happened. Raises InUse."""
        return self._client.evict(name, tier)

    def plan_eviction(self, name: str, tier: str = "ddr") -> list[VictimView]:
        """What `evict` would do; nothing changes."""
        return self._client.plan_eviction(name, tier)

    def delete(self, name: str) -> None:
        """Forget a document. Raises InUse while it is leased or pinned."""
        self._client.delete(name)

    def tiers(self) -> list[TierView]:
        """Capacity and use of every device."""
        return self._client.tiers()
