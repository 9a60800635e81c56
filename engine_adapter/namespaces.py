"""Namespaces of opaque objects: by engine, model and everything that decides what the bytes mean.

Whoever reads other bytes than it would write reads garbage. So a namespace is a digest over the model's identity and
the engine's layout: what differs in anything is not found. `announce` says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from ..kvstore.errors import HoldfastError
from .api import Store
from .checkpoint_identity import checkpoint_digest

SHORT_LENGTH: Final = 40
DIGEST_BYTES: Final = 8
ANNOUNCE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose bytes they are: an engine, a model as the engine calls it, and `facts` that decide what they mean.

    `part` tells apart what an engine keeps side by side: ranks, pools.
    """

    engine: str
    model: str
    facts: Mapping[str, Any]  # JSON values
    part: str = ""

    @property
    def namespace(self) -> str:
        """A name for Store.objects: "<engine>-<model>-<16 hex digits>"."""
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", self.model.rstrip("/").rpartition("/")[2])[:SHORT_LENGTH]
        return f"{self.engine}-{short or 'model'}-{_digest(self.engine, self.model, self.part, self.text)}"

    @property
    def text(self) -> str:
        """The facts, the same whatever order they come in."""
        return json.dumps(self.facts, sort_keys=True, separators=(",", ":"), default=str)


def model_identity(model: str) -> str:
    """What changes when the weights do: a digest of a checkpoint directory's config and weights, else the name itself.

    A name of a hub may come to mean other weights: then whoever configures an adapter says the revision as well.
    """
    if not Path(model).is_dir():
        return model
    with suppress(HoldfastError):
        return checkpoint_digest(Path(model))
    # No config and safetensors there: names, sizes and times of change still tell one set of weights from the next.
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    return _digest(*(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files))


def announce(store: Store, origin: Origin, deadline_seconds: float = ANNOUNCE_SECONDS) -> list[str]:
    """Leave word of this origin for the next engine, and say what differs from the last one's: ["block: 32 -> 64"].

    Nothing differs where nobody left word, or where it was lost: it is an object like others. Raises HoldfastError.
    """
    objects = store.objects(f"{origin.engine}-origins")
    key = bytes.fromhex(_digest(origin.engine, origin.model, origin.part))
    before: dict[str, Any] = {}
    with objects.get([key], deadline_seconds=deadline_seconds) as (view,):
        if view is not None:
            with suppress(ValueError):
                before = dict(json.loads(bytes(view)))
    now = json.loads(origin.text)
    if before == now:
        return []
    objects.delete([key])
    objects.put([(key, origin.text.encode())], deadline_seconds=deadline_seconds)
    if not before:
        return []
    names = sorted({*before, *now})
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def _digest(*parts: str) -> str:
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()
