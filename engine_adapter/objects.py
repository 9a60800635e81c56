"""Objects: opaque bytes under keys of an engine's own, in a namespace: `store.objects(namespace)`.

Payload goes straight between the caller's buffers and shared memory, one copy each way, which numpy makes without the
interpreter's lock. Whatever is wrong with one object, or with the daemon while it gets or stores one, is that object's
miss or refusal; only what the caller got wrong is raised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from ..kvstore.document import WritePolicy
from ..kvstore.errors import DaemonUnavailable, HoldfastError, InvalidRequest, NoCapacity, Unavailable, from_code
from ..kvstore.object_client import ObjectClient
from ..kvstore.object_messages import PutBegun
from ..kvstore.object_views import NamespaceView
from ..kvstore.opaque import OBJECTS_AT_ONCE, checked_namespace
from ..kvstore.runs import PartMessage
from ..kvstore.seal import checksum

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | npt.NDArray[np.generic]
BATCH_BYTES: Final = 256 << 20  # of one message: what has to be in DDR at once


@dataclass(frozen=True, slots=True)
class Gathered:
    """A payload that lies in several buffers, one after the other: it is put together where it is stored."""

    parts: Sequence[Buffer]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(_flat(part).nbytes for part in self.parts)


class PutStatus(StrEnum):
    """What became of an object that was put."""

    STORED = "stored"
    PRESENT = "present"  # it was there already, and is not written again
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class PutResult:
    """`error` says why an object was refused."""

    status: PutStatus
    error: HoldfastError | None = None

    @property
    def is_there(self) -> bool:
        """Whether the store has it now."""
        return self.status is not PutStatus.REFUSED


STORED: Final = PutResult(PutStatus.STORED)
PRESENT: Final = PutResult(PutStatus.PRESENT)


class Objects:
    """A namespace of a tenant's objects. Methods may be called from any thread; a batch of objects is one message."""

    def __init__(self, client: ObjectClient, namespace: str) -> None:
        self._client = client
        self.namespace = checked_namespace(namespace)

    # In ----------------------------------------------------------------------------------------

    def put(
        self,
        items: Sequence[tuple[bytes, Buffer | Gathered]],
        *,
        write_policy: WritePolicy = WritePolicy.AUTO,
        deadline_seconds: float = 10.0,
        tokens_each: int = 0,
        ttl_seconds: float | None = None,
        behind: bytes | None = None,
    ) -> list[PutResult]:
        """Store objects, each (key of 1 to 128 bytes, payload); what became of each, in order.

        Object i + 1 is one that is of use only behind object i, so that eviction takes the last first; the first one
        only behind that of the key `behind`, which may have been stored before. `tokens_each`: how many tokens have to
        be computed again where one of them is lost. The deadline is for each of the two waits of a message: for slots,
        and to be published. Whatever else is wrong is a result. Raises InvalidRequest for what is no buffer, and
        DaemonUnavailable.
        """
        payloads = [(key, _parts(payload)) for key, payload in items]
        results: list[PutResult] = []
        for batch in _batches(payloads):
            try:
                begun = self._client.begin_put(
                    self.namespace,
                    [(key, _size_bytes(parts)) for key, parts in batch],
                    write_policy=write_policy,
                    deadline_seconds=deadline_seconds,
                    tokens_each=tokens_each,
                    ttl_seconds=ttl_seconds,
                    behind=behind,
                )
                behind = batch[-1][0]
                results += self._finish(begun, [payload for _, payload in batch], deadline_seconds)
            except (InvalidRequest, DaemonUnavailable):
                raise
            except HoldfastError as error:
                results += [PutResult(PutStatus.REFUSED, error)] * len(batch)
        return results

    def _finish(self, begun: PutBegun, payloads: Sequence[list[Bytes]], deadline_seconds: float) -> list[PutResult]:
        """Fill what was given a slot, and have it published."""
        given = [(slot, payload) for slot, payload in zip(begun.slots, payloads, strict=True) if slot is not None]
        if not given:
            return [_result(None, begun.refused.get(number)) for number in range(len(payloads))]
        seals: list[bytes] | None = None
        try:
            seals = self._fill(given)
        finally:
            if seals is None:
                with suppress(HoldfastError):
                    self._client.abort_put(begun.put)
        refused = begun.refused | self._client.commit_put(begun.put, seals, deadline_seconds).refused
        return [_result(slot, refused.get(number)) for number, slot in enumerate(begun.slots)]

    def _fill(self, given: Sequence[tuple[PartMessage, list[Bytes]]]) -> list[bytes]:
        """Copy payloads into their slots; returns their seals."""
        seals = []
        views = self._client.views([slot for slot, _ in given])
        for view, (_, parts) in zip(views, given, strict=True):
            slot, offset = np.frombuffer(view, np.uint8), 0
            for part in parts:
                np.copyto(slot[offset : offset + part.nbytes], part)
                offset += part.nbytes
            slot[offset:] = 0
            seals.append(checksum(view))
        return seals

    # Out ---------------------------------------------------------------------------------------

    @contextmanager
    def get(self, keys: Sequence[bytes], *, deadline_seconds: float = 30.0) -> Iterator[list[memoryview | None]]:
        """Lease objects: read-only views of shared memory, in order, good until the block ends; None is a miss.

        What is on NVMe only is brought up, and verified. Raises Unavailable when there is no daemon.
        """
        found: list[memoryview | None] = []
        with ExitStack() as leases:
            for first in range(0, len(keys), OBJECTS_AT_ONCE):
                leased = self._client.get(self.namespace, keys[first : first + OBJECTS_AT_ONCE], deadline_seconds)
                leases.enter_context(self._released(leased.lease))
                found += self._views(leased.slots)
            yield found

    def _views(self, slots: Sequence[PartMessage | None]) -> list[memoryview | None]:
        here = [slot for slot in slots if slot is not None]
        views = iter(self._client.views(here))
        return [None if slot is None else next(views)[: slot.valid_tokens].toreadonly() for slot in slots]

    def load_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], *, deadline_seconds: float = 30.0
    ) -> list[bool]:
        """Copy objects into the caller's buffers; which were there, and as long as their buffer.

        Raises InvalidRequest for what is no writable buffer, and Unavailable when there is no daemon.
        """
        if len(keys) != len(buffers):
            raise InvalidRequest(f"{len(buffers)} buffers for {len(keys)} keys")
        targets = [_flat(buffer) for buffer in buffers]
        if not all(target.flags.writeable for target in targets):
            raise InvalidRequest("objects are loaded into writable buffers")
        loaded: list[bool] = []
        for batch in _batches([(key, [target]) for key, target in zip(keys, targets, strict=True)]):
            loaded += self._loaded([(key, target) for key, (target,) in batch], deadline_seconds)
        return loaded

    def _loaded(self, batch: Sequence[tuple[bytes, Bytes]], deadline_seconds: float) -> list[bool]:
        """See `load_into`. Those for which there is no room beside the others are asked for again, behind them."""
        loaded = [False] * len(batch)
        until = time.monotonic() + deadline_seconds
        waiting = list(range(len(batch)))
        while waiting:
            left = max(0.0, until - time.monotonic())
            leased = self._client.get(self.namespace, [batch[number][0] for number in waiting], left)
            with self._released(leased.lease):
                for number, view in zip(waiting, self._views(leased.slots), strict=True):
                    target = batch[number][1]
                    if view is not None and view.nbytes == target.nbytes:
                        np.copyto(target, np.frombuffer(view, np.uint8))
                        loaded[number] = True
            crowded = [waiting[place] for place, (code, _) in leased.refused.items() if code == NoCapacity.code]
            waiting = sorted(crowded) if len(crowded) < len(waiting) else []
        return loaded

    @contextmanager
    def _released(self, lease: int) -> Iterator[None]:
        """End a lease at the end of the block."""
        try:
            yield
        finally:
            with suppress(Unavailable):  # a daemon that is gone holds no lease
                self._client.release(lease)

    # By key ------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes], *, deadline_seconds: float = 30.0) -> list[str | None]:
        """The nearest tier of each ("ddr", "nvme"); None: it is not there. Nothing is leased, and nothing learnt."""
        return [tier for some in _some(keys) for tier in self._client.find(self.namespace, some, deadline_seconds)]

    def keys(self, skip: int = 0) -> Iterator[tuple[bytes, int]]:
        """Keys and sizes in bytes, in the order in which they came, but for the first `skip`.

        While objects leave, some may be passed over.
        """
        while some := self._client.listed(self.namespace, skip):
            yield from some
            skip += len(some)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Say that these are used, without reading them."""
        for some in _some(keys):
            self._client.touch(self.namespace, some)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget these; which were there, and are gone. What is leased, pinned or being stored stays."""
        return [gone for some in _some(keys) for gone in self._client.delete(self.namespace, some)]

    def pin(
        self,
        keys: Sequence[bytes] | None = None,
        *,
        key_prefix: bytes | None = None,
        tier: str = "ddr",
        ttl_seconds: float | None = None,
        owner: str = "",
        reason: str = "",
        kind: str = "hard",
        refresh: str = "never",
    ) -> int:
        """Keep objects at or above a tier: those of these keys that are there, or all whose keys begin so.

        How many. All of them are pinned, or none: raises PinsOvercommitted, with the pins in the way. (Of more than
        256 keys, those before the message that was refused.) See Store.pin.
        """
        return sum(
            self._client.pin(
                self.namespace,
                some,
                key_prefix,
                tier,
                ttl_seconds=ttl_seconds,
                owner=owner,
                reason=reason,
                kind=kind,
                refresh=refresh,
            )
            for some in _chosen(keys, key_prefix)
        )

    def unpin(self, keys: Sequence[bytes] | None = None, *, key_prefix: bytes | None = None) -> int:
        """Let them sink again; how many were pinned."""
        return sum(self._client.unpin(self.namespace, some, key_prefix) for some in _chosen(keys, key_prefix))

    # All of it ---------------------------------------------------------------------------------

    def clear(self) -> int:
        """Forget all objects of the namespace; how many. What is leased, pinned or being stored stays."""
        return self._client.clear(self.namespace)

    def stats(self) -> NamespaceView:
        """What the namespace has, and how often it was asked."""
        return self._client.namespaces(self.namespace)[0]


def _chosen(keys: Sequence[bytes] | None, key_prefix: bytes | None) -> Iterator[Sequence[bytes] | None]:
    """One message, or as many as the keys take. Raises InvalidRequest unless just one of them is said."""
    if (keys is None) == (key_prefix is None):
        raise InvalidRequest("name objects by their keys, or by a prefix of their keys")
    return iter([None]) if keys is None else _some(keys)


def _some(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (keys[first : first + OBJECTS_AT_ONCE] for first in range(0, len(keys), OBJECTS_AT_ONCE))


def _result(slot: PartMessage | None, refusal: tuple[str, str] | None) -> PutResult:
    if refusal is not None:
        return PutResult(PutStatus.REFUSED, from_code(*refusal))
    return STORED if slot is not None else PRESENT


def _batches(items: Sequence[tuple[bytes, list[Bytes]]]) -> Iterator[Sequence[tuple[bytes, list[Bytes]]]]:
    """As many at once as one message may have, and DDR may have to take."""
    first, size_bytes = 0, 0
    for number, (_, parts) in enumerate(items):
        size_bytes += _size_bytes(parts)
        if number > first and (size_bytes > BATCH_BYTES or number - first == OBJECTS_AT_ONCE):
            yield items[first:number]
            first, size_bytes = number, _size_bytes(parts)
    if first < len(items):
        yield items[first:]


def _parts(payload: Buffer | Gathered) -> list[Bytes]:
    return [_flat(part) for part in payload.parts] if isinstance(payload, Gathered) else [_flat(payload)]


def _size_bytes(parts: Sequence[Bytes]) -> int:
    return sum(part.nbytes for part in parts)


def _flat(buffer: Buffer) -> Bytes:
    """A buffer's bytes as one row, without a copy. Raises InvalidRequest."""
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise InvalidRequest("an object's array has its bytes one after another (C order)")
        return buffer.reshape(-1).view(np.uint8)
    try:
        view = memoryview(buffer)
        return np.frombuffer(view.cast("B") if view.nbytes else b"", np.uint8)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"an object's bytes come in a contiguous buffer, not {type(buffer).__qualname__}"
        ) from error
