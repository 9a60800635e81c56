"""Handout: descriptors of slabs, for clients of the tenant that they serve. Who got which is written down before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from .arena import Arena
from .errors import HoldfastError, ProtocolError, Unavailable
from .orders import DropFence, PutFence
from .slots import SlabPool
from .warm import WarmIndex


class Receiver(NamedTuple):
    """Who gets descriptors: a client, and its process, which `started` then; None when we cannot see it."""

    client: int
    tenant: str
    pid: int
    started: int | None


def close_all(descriptors: Iterable[int]) -> None:
    """Close them."""
    for descriptor in descriptors:
        os.close(descriptor)


class Handout:
    """Opens descriptors of the arena's slabs, and keeps the index of who has some."""

    def __init__(self, pool: SlabPool, arena: Arena, index: WarmIndex) -> None:
        self._pool = pool
        self._arena = arena
        self._index = index

    async def open(self, slabs: Sequence[int], receiver: Receiver) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
        """(slab, serial) of each and a descriptor of each, the caller's to close. A tenant may see the slabs it owns.

        Raises ProtocolError for another's slab, Unavailable without descriptors, StorageFailed without memory.
        """
        for slab in slabs:
            if self._pool.owner(slab) != receiver.tenant:
                raise _foreign(slab, receiver.tenant)
        wanted = [(slab, self._arena.serial(slab)) for slab in slabs]
        # Their memory may have to be made first, which takes as long as touching every page: not on the loop.
        opening = asyncio.get_running_loop().run_in_executor(None, self._opened, wanted, receiver)
        try:
            return wanted, await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise

    async def settled(self) -> None:
        """Return when the index has heard all: what lay in slots that are to be written to, what was deleted."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def told() -> None:
            if not done.done():
                done.set_result(None)

        def then() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(told)

        if not self._index.is_settled(then):
            await done

    def gone(self, client: int) -> None:
        """The client looks at nothing any more."""
        self._index.note([DropFence(client)], self._arena.serial)

    def _opened(self, wanted: Sequence[tuple[int, int]], receiver: Receiver) -> tuple[int, ...]:
        """All or none."""
        if receiver.started is not None:
            fences = [PutFence(receiver.client, receiver.pid, receiver.started, serial) for _, serial in wanted]
            self._index.fence(fences)
        descriptors: list[int] = []
        try:
            for slab, serial in wanted:
                descriptor = self._arena.descriptor(slab, serial)
                if descriptor is None:  # it changed hands meanwhile
                    raise _foreign(slab, receiver.tenant)
                descriptors.append(descriptor)
        except HoldfastError:
            close_all(descriptors)
            raise
        except OSError as error:
            close_all(descriptors)
            raise Unavailable(f"no more descriptors: {error.strerror}; try again, or raise `ulimit -n`") from error
        return tuple(descriptors)


def _close_opened(opening: asyncio.Future[tuple[int, ...]]) -> None:
    """Nobody waits for these descriptors any more."""
    if not opening.cancelled() and opening.exception() is None:
        close_all(opening.result())


def _foreign(slab: int, tenant: str) -> ProtocolError:
    return ProtocolError(f"slab {slab} does not serve tenant {tenant!r}")
