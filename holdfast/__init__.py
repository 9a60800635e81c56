"""Holdfast keeps the KV cache of long documents where it pays to keep it.

This package is the front door: it composes the four rooms (`holdfast.kvstore`, `holdfast.eviction`,
`holdfast.ring_attention`, `holdfast.engine_adapter`), holds the public names and the command line,
and is imported by none of them.

    with holdfast.connect() as store, store.attach("contract") as document:
        for layer in document.layers():
            key, value = layer.gathered()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine_adapter.api import Store, connect
    from .engine_adapter.async_store import AsyncAttachment, AsyncStore, AsyncWriter, connect_async
    from .engine_adapter.attachment import Attachment, LayerKV
    from .engine_adapter.objects import Objects, PutResult
    from .engine_adapter.session import Session
    from .engine_adapter.writer import IngestWriter
    from .kvstore.document import WritePolicy
    from .kvstore.errors import HoldfastError
    from .kvstore.spec import GroupKind, KVSpec, LayerGroup, sized

__version__ = "0.1.0"

# Names load on first use, so that `import holdfast` and the command line stay light.
_PLACES = {
    "AsyncAttachment": "engine_adapter.async_store",
    "AsyncStore": "engine_adapter.async_store",
    "AsyncWriter": "engine_adapter.async_store",
    "Attachment": "engine_adapter.attachment",
    "GroupKind": "kvstore.spec",
    "HoldfastError": "kvstore.errors",
    "IngestWriter": "engine_adapter.writer",
    "KVSpec": "kvstore.spec",
    "LayerGroup": "kvstore.spec",
    "LayerKV": "engine_adapter.attachment",
    "Objects": "engine_adapter.objects",
    "PutResult": "engine_adapter.objects",
    "Session": "engine_adapter.session",
    "Store": "engine_adapter.api",
    "WritePolicy": "kvstore.document",
    "connect": "engine_adapter.api",
    "connect_async": "engine_adapter.async_store",
    "sized": "kvstore.spec",
}

__all__ = [
    "AsyncAttachment",
    "AsyncStore",
    "AsyncWriter",
    "Attachment",
    "GroupKind",
    "HoldfastError",
    "IngestWriter",
    "KVSpec",
    "LayerGroup",
    "LayerKV",
    "Objects",
    "PutResult",
    "Session",
    "Store",
    "WritePolicy",
    "connect",
    "connect_async",
    "sized",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
