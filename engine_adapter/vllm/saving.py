"""Saving: what a request has prefilled goes into the store, copied once, beside the engine's decoding."""

from __future__ import annotations

from functools import partial

import numpy as np

from ...kvstore.document import WritePolicy
from ...kvstore.errors import HoldfastError
from ..api import Store
from ..link import Link
from ..pages import Array
from ..writer import IngestWriter
from .caches import Blocks, Caches
from .plans import Save, Saved
from .tasks import Task


def save(order: Save, link: Link, caches: Caches, task: Task[Saved], write_policy: str, seconds: float) -> Saved:
    """Carry a save out: all of it is published, or nothing."""
    try:
        with link.use() as store:
            left = max(seconds - task.seconds, 0.001)
            with store.ingest(
                order.name,
                caches.spec.canonical() if order.canonical else caches.spec,
                order.tokens,
                extras=order.extras,
                write_policy=WritePolicy(write_policy),
                deadline_seconds=left,
            ) as writer:
                (_decode if order.canonical else _copy)(writer, order, caches, task)
                task.let_go()
            pin_problem = _pin(order, store)
    except HoldfastError as error:
        return dropped(order, task, error.message)
    return Saved(request=order.request, token_count=len(order.tokens), seconds=task.seconds, pin_problem=pin_problem)


def dropped(order: Save, task: Task[Saved], problem: str) -> Saved:
    """A save that published nothing."""
    return Saved(request=order.request, token_count=0, seconds=task.seconds, problem=problem)


def _copy(writer: IngestWriter, order: Save, caches: Caches, task: Task[Saved]) -> None:
    size = caches.page_tokens
    tables = [np.asarray(table, np.int64) for table in order.blocks]
    for start, stop in writer.missing:
        first, count = start // size, (stop - start) // size
        for group in caches.spec.groups:
            for layer in group.layers:
                fill = partial(_fill, caches, task, layer, tables[caches.group_of(layer)])
                writer.write_pages(layer, first, count, fill)


def _decode(writer: IngestWriter, order: Save, caches: Caches, task: Task[Saved]) -> None:
    """In canonical form, which ends at any token."""
    size = caches.page_tokens
    tables = [np.asarray(table, np.int64) for table in order.blocks]
    for start, stop in writer.missing:
        first, last = start // size, -(-stop // size)
        here = slice(start - first * size, stop - first * size)
        for layer in (layer for group in caches.spec.groups for layer in group.layers):
            with task.touching():
                key, value = caches.decode(layer, tables[caches.group_of(layer)][first:last])
            writer.write(layer, start, key[:, here], value[:, here])


def _fill(caches: Caches, task: Task[Saved], layer: int, table: Blocks, first_page: int, pages: Array) -> None:
    with task.touching():
        caches.take(layer, table[first_page : first_page + len(pages)], pages)


def _pin(order: Save, store: Store) -> str | None:
    """Pin the document as its request asked; returns what went wrong."""
    if order.pin is None or order.name is None:
        return None
    pin = order.pin
    try:
        store.pin(order.name, pin.tier, ttl_seconds=pin.ttl_seconds, owner=pin.owner, reason=pin.reason)
    except HoldfastError as error:
        return error.message
    return None
