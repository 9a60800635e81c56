"""AsyncStore: the Python API for asyncio. The same methods, run on a few threads, because the client is thread-safe.

    async with holdfast.connect_async() as store, store.attach("contract") as document:
        async for layer in document.layers():
            key, value = layer.gathered()

A task that is cancelled gives back what it holds, and what it would have got.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from ..kvstore.errors import DaemonUnavailable
from ..kvstore.spec import KVSpec
from .api import Store, connect
from .attachment import Attachment, LayerKV
from .objects import Objects
from .writer import IngestWriter

THREADS: Final = 8
KEYS_AT_ONCE: Final = 256

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
A = TypeVar("A")


class Threads:
    """Bounded pools of threads: one for what waits for room, so that what makes room is not queued behind it."""

    def __init__(self, count: int) -> None:
        self._entering, self._doing, self._leaving = (
            ThreadPoolExecutor(count, thread_name_prefix=f"holdfast-{what}") for what in ("enter", "do", "leave")
        )

    async def run(self, call: Callable[[], R]) -> R:
        """What a call returns. Cancelled, it runs to its end if it has begun."""
        return await asyncio.wrap_future(_submitted(self._doing, call))

    @asynccontextmanager
    async def entered(self, make: Callable[[], AbstractContextManager[R]]) -> AsyncIterator[R]:
        """A context manager, entered and left on threads; left, too, when it is entered after a cancellation."""

        def enter() -> tuple[AbstractContextManager[R], R]:
            context = make()
            return context, context.__enter__()

        entering = _submitted(self._entering, enter)
        try:
            context, value = await asyncio.wrap_future(entering)
        except asyncio.CancelledError:
            entering.add_done_callback(self._leave_late)
            raise
        try:
            yield value
        finally:
            error = sys.exception()
            leaving = asyncio.wrap_future(self._leave(context, error))
            leaving.add_done_callback(_looked_at)
            await asyncio.wait([leaving])  # which goes on, whoever is cancelled meanwhile
            raised = leaving.exception()
            if raised is not None and raised is not error:  # it may raise again what it was left with
                raise raised

    def _leave_late(self, entering: Future[tuple[AbstractContextManager[R], R]]) -> None:
        if not entering.cancelled() and entering.exception() is None:
            self._leave(entering.result()[0], asyncio.CancelledError())

    def _leave(self, context: AbstractContextManager[object], error: BaseException | None) -> Future[bool | None]:
        trace = error.__traceback__ if error is not None else None
        leave = partial(context.__exit__, type(error) if error is not None else None, error, trace)
        try:
            return self._leaving.submit(leave)
        except RuntimeError:  # closed: the daemon has everything back, but this process has not
            pool = ThreadPoolExecutor(1, thread_name_prefix="holdfast-leave")
            left = pool.submit(leave)
            pool.shutdown(wait=False)
            return left

    def close(self) -> None:
        """Take nothing new, and end the threads when what they do has ended."""
        for pool in (self._entering, self._doing, self._leaving):
            pool.shutdown(wait=False, cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, call: Callable[[], R]) -> Future[R]:
    try:
        return pool.submit(call)
    except RuntimeError as error:
        raise DaemonUnavailable("this connection is closed; keep what uses it inside its `async with`") from error


def _looked_at(future: asyncio.Future[bool | None]) -> None:
    if not future.cancelled():
        future.exception()


class _Threaded(Protocol[S]):
    """Somebody whose synchronous half works on threads."""

    _sync: S
    _threads: Threads


def _lifted(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[_Threaded[S], P], Coroutine[Any, Any, R]]:
    """The same method, awaited."""

    @wraps(method)
    async def call(self: _Threaded[S], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._threads.run(partial(method, self._sync, *args, **kwargs))

    return call


def _opened(
    method: Callable[Concatenate[S, P], AbstractContextManager[R]], twin: Callable[[R, Threads], A]
) -> Callable[Concatenate[_Threaded[S], P], AbstractAsyncContextManager[A]]:
    """The same context manager, for `async with`."""

    @wraps(method)
    @asynccontextmanager
    async def opened(self: _Threaded[S], /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[A]:
        async with self._threads.entered(partial(method, self._sync, *args, **kwargs)) as entered:
            yield twin(entered, self._threads)

    return opened


def _same(views: list[memoryview | None], _: Threads) -> list[memoryview | None]:
    return views


class AsyncAttachment:
    """See Attachment: a leased document, or the part of it [start, stop) that `tokens` says."""

    def __init__(self, attachment: Attachment, threads: Threads) -> None:
        self._sync = attachment
        self._threads = threads

    @property
    def spec(self) -> KVSpec:
        """Of the document."""
        return self._sync.spec

    @property
    def token_count(self) -> int:
        """Of the whole document."""
        return self._sync.token_count

    @property
    def tokens(self) -> tuple[int, int]:
        """What of it is leased."""
        return self._sync.tokens

    async def layers(self, *, deadline_seconds: float = 600.0) -> AsyncIterator[LayerKV]:
        """Every layer, in order, each as soon as it may be read; no copy. Raises what Attachment.layers does.

        Copying one (`gathered`, `copy_into`) takes as long as memory does: do it on a thread if others wait.
        """
        layers = self._sync.layers(deadline_seconds=deadline_seconds)
        while (layer := await self._threads.run(partial(next, layers, None))) is not None:
            yield layer

    report = _lifted(Attachment.report)


class AsyncWriter:
    """See IngestWriter: write every layer of the `missing` tokens."""

    def __init__(self, writer: IngestWriter, threads: Threads) -> None:
        self._sync = writer
        self._threads = threads

    @property
    def cached_tokens(self) -> int:
        """Leading tokens whose KV the store has already."""
        return self._sync.cached_tokens

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Token ranges [start, stop) to write, one per extent, in order."""
        return self._sync.missing

    write = _lifted(IngestWriter.write)
    write_pages = _lifted(IngestWriter.write_pages)


class AsyncObjects:
    """See Objects: opaque bytes under an engine's keys."""

    def __init__(self, objects: Objects, threads: Threads) -> None:
        self._sync = objects
        self._threads = threads

    @property
    def namespace(self) -> str:
        """In which they are."""
        return self._sync.namespace

    async def keys(self, skip: int = 0) -> AsyncIterator[tuple[bytes, int]]:
        """Keys and sizes in bytes, in the order in which they came, but for the first `skip`."""
        found = self._sync.keys(skip)
        while some := await self._threads.run(lambda: list(islice(found, KEYS_AT_ONCE))):
            for one in some:
                yield one

    put = _lifted(Objects.put)
    get = _opened(Objects.get, _same)
    load_into = _lifted(Objects.load_into)
    find = _lifted(Objects.find)
    touch = _lifted(Objects.touch)
    delete = _lifted(Objects.delete)
    pin = _lifted(Objects.pin)
    unpin = _lifted(Objects.unpin)
    clear = _lifted(Objects.clear)
    stats = _lifted(Objects.stats)


class AsyncStore:
    """See Store: the same methods, arguments and errors, to be awaited."""

    def __init__(self, store: Store, threads: Threads) -> None:
        self._sync = store
        self._threads = threads

    attach = _opened(Store.attach, AsyncAttachment)
    attach_prefix = _opened(Store.attach_prefix, AsyncAttachment)
    ingest = _opened(Store.ingest, AsyncWriter)

    lookup = _lifted(Store.lookup)
    documents = _lifted(Store.documents)
    document = _lifted(Store.document)
    pin = _lifted(Store.pin)
    unpin = _lifted(Store.unpin)
    unpin_all = _lifted(Store.unpin_all)
    pins = _lifted(Store.pins)
    prefetch = _lifted(Store.prefetch)
    delete = _lifted(Store.delete)
    clear = _lifted(Store.clear)
    free = _lifted(Store.free)
    plan_free = _lifted(Store.plan_free)
    tiers = _lifted(Store.tiers)
    namespaces = _lifted(Store.namespaces)

    @property
    def is_open(self) -> bool:
        """Whether the daemon is still there, as far as we know."""
        return self._sync.is_open

    def objects(self, namespace: str) -> AsyncObjects:
        """See Store.objects; asks nobody yet."""
        return AsyncObjects(self._sync.objects(namespace), self._threads)


@asynccontextmanager
async def connect_async(
    socket: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    tenant: str = "default",
    threads: int = THREADS,
) -> AsyncIterator[AsyncStore]:
    """A connection for the length of an `async with` block: see `connect`. Raises DaemonUnavailable.

    As many attaches and ingests as `threads` may wait for room at once, and as many other calls; more wait their turn.
    """
    pools = Threads(threads)
    try:
        async with pools.entered(partial(connect, socket, data_dir=data_dir, tenant=tenant)) as store:
            yield AsyncStore(store, pools)
    finally:
        pools.close()
