"""Loading: brings cached tokens into the engine's blocks, layer by layer as they come; what cannot be had is said."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import numpy as np

from ...kvstore.errors import CorruptExtent, HoldfastError, PrefixNotFound, StorageFailed
from ..api import Store
from ..attachment import Attachment, LayerKV
from ..link import Link
from .caches import Blocks, Caches
from .plans import Load, Loaded
from .tasks import Task, use_all_cores

LANES: Final = 2  # threads of one load: a core alone does not copy as fast as memory allows
PIECE_BYTES: Final = 16 << 20  # the engine may have to wait for one to be copied, when it takes blocks away
ATTEMPTS: Final = 3  # an extent that was found damaged is put aside, and what lies before it can still be had


def load(order: Load, link: Link, caches: Caches, task: Task[Loaded], seconds: float) -> Loaded:
    """Carry a load out. What is there afterwards is a prefix of it, in whole pages, in every layer."""
    problem = None
    for _ in range(ATTEMPTS):
        try:
            with link.use() as store:
                return _load(order, store, caches, task, seconds, problem)
        except (CorruptExtent, StorageFailed) as error:
            problem = error.message
        except PrefixNotFound as error:
            problem = problem or error.message
            break
        except HoldfastError as error:
            problem = error.message
            break
    return nothing(order, task, problem or "it cannot be read")


def nothing(order: Load, task: Task[Loaded], problem: str) -> Loaded:
    """A load that brought nothing."""
    return Loaded(request=order.request, stop=order.start, seconds=task.seconds, problem=problem)


def _load(order: Load, store: Store, caches: Caches, task: Task[Loaded], seconds: float, problem: str | None) -> Loaded:
    spec = caches.spec.canonical() if order.canonical else caches.spec
    tokens = order.tokens[: order.stop]
    left = max(seconds - task.seconds, 0.001)
    with store.attach_prefix(spec, tokens, extras=order.extras, deadline_seconds=left) as attached:
        page_tokens = caches.page_tokens
        stop = min(order.stop, attached.tokens[1] // page_tokens * page_tokens)
        if stop > order.start:
            _copy(attached, order, stop, caches, task, seconds)
        receipt = _receipt(attached, task)
    if stop <= order.start:
        return nothing(order, task, problem or "it has left the cache meanwhile")
    if stop < order.stop:
        problem = problem or "some of it has left the cache meanwhile"
    return Loaded(request=order.request, stop=stop, seconds=task.seconds, receipt=receipt, problem=problem)


def _copy(attached: Attachment, order: Load, stop: int, caches: Caches, task: Task[Loaded], seconds: float) -> None:
    first = order.start // caches.page_tokens
    tables = [np.asarray(table, np.int64)[: stop // caches.page_tokens - first] for table in order.blocks]

    def copy(layer: LayerKV) -> None:
        table = tables[caches.group_of(layer.index)]
        if order.canonical:
            _encode(layer, table, (order.start, stop), caches, task)
            return
        for number, extents in layer.pages(order.start, stop):
            each = extents.shape[1]
            step = max(PIECE_BYTES // extents[0].nbytes, 1)
            for at in range(0, len(extents), step):
                pages, begin = extents[at : at + step], number - first + at * each
                with task.touching():
                    caches.put(layer.index, table[begin : begin + len(pages) * each], pages)

    left = max(seconds - task.seconds, 0.001)  # then this thread has others' loads to do
    with ThreadPoolExecutor(LANES, "holdfast-copy", use_all_cores) as lanes:
        copies = [lanes.submit(copy, layer) for layer in attached.layers(deadline_seconds=left)]
    for copied in copies:
        copied.result()


def _encode(layer: Any, table: Blocks, tokens: tuple[int, int], caches: Caches, task: Task[Loaded]) -> None:
    """Pages from canonical pieces, which need not begin or end where pages do."""
    size = caches.page_tokens
    start, stop = tokens
    rest_key = rest_value = None  # tokens of the page that is not complete yet
    at = start
    for piece in layer.pieces:
        low, high = max(piece.start, start), min(piece.start + piece.key.shape[1], stop)
        if low >= high:
            continue
        key, value = (array[:, low - piece.start : high - piece.start] for array in (piece.key, piece.value))
        if rest_key is not None and rest_value is not None:
            key = np.concatenate([rest_key, key], axis=1)
            value = np.concatenate([rest_value, value], axis=1)
        count = key.shape[1] // size
        if count:
            page = (at - start) // size
            with task.touching():
                whole = count * size
                caches.encode(layer.index, table[page : page + count], key[:, :whole], value[:, :whole])
            at += count * size
        rest_key, rest_value = key[:, count * size :], value[:, count * size :]
    assert at == stop, "pages are whole"


def _receipt(attached: Attachment, task: Task[Loaded]) -> Mapping[str, Any] | None:
    """The SwapView as plain data. The request waited for all of the load: nothing of it was hidden from it."""
    try:
        swap = attached.report(exposed_ns=int(task.seconds * 1e9))
    except HoldfastError:
        return None  # the KV is here; that the daemon went away just now changes nothing
    plain: dict[str, Any] = msgspec.to_builtins(swap)
    return plain
