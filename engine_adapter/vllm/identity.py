"""Identity: the KVSpec of what this rank of an engine keeps, from what the engine says of itself; or why there is none.

Anything that changes KV, and that tokens do not say, must be in it: weights, dtype, rotary parameters, quantisation,
the rank's part. What cannot be told refuses the store: KV of another model would be a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from ...kvstore.errors import HoldfastError, InvalidSpec, UnknownPageFormat
from ...kvstore.spec import KVSpec, LayerGroup, sized
from ...ring_attention.identity import CONFIG_FILE, read_json
from ..checkpoint_identity import checkpoint_digest, checkpoint_spec, model_spec
from ..pages import FORMATS, native, undescribed
from .plans import Ready

DTYPES: Final = ("bfloat16", "float16", "float32")
SETTLED_ROPES: Final = ("default", "llama3", "linear", "yarn", "mrope", "proportional")  # the same at any length


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """One of the engine's KV cache groups: these layers share a block table.

    `kind` is the engine's own name of it. Heads are this rank's.
    """

    kind: str
    layers: tuple[int, ...]
    block_tokens: int
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine says of itself. `overrides` are changes of the checkpoint's config; None: they cannot be told.

    `media` is what it changes in how pictures are prepared.
    `format_name` is the page format of its backend; `refusals` what of its configuration the connector cannot serve.
    """

    model: str
    dtype: str
    vocabulary_size: int
    groups: tuple[CacheGroup, ...]
    format_name: str | None
    backend: str
    quantisation: str = ""
    overrides: Mapping[str, Any] | None = None
    rope_type: str = "default"
    max_tokens: int = 0
    media: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1
    refusals: tuple[str, ...] = ()


def ready(engine: Engine, *, model: str | None, accept: Literal["verified", "any"]) -> Ready:
    """This rank's half of the handshake. `model` names the weights where their digest cannot or shall not be taken."""
    try:
        return _ready(engine, model, accept)
    except UnknownPageFormat as error:
        return Ready(reason=f"{error.message}; holdfast.unverified_formats takes it")
    except HoldfastError as error:
        return Ready(reason=error.message)
    except OSError as error:
        return Ready(reason=f"the checkpoint cannot be read: {error}")


def _ready(engine: Engine, model: str | None, accept: Literal["verified", "any"]) -> Ready:
    if engine.refusals:
        raise InvalidSpec("; ".join(engine.refusals))
    if engine.dtype not in DTYPES:
        raise InvalidSpec(f"KV of dtype {engine.dtype} is not supported yet; use --kv-cache-dtype auto")
    if engine.format_name is None:
        raise InvalidSpec(f"the pages of {engine.backend} are laid out in no way that Holdfast knows")
    shapes = {(group.block_tokens, group.heads, group.key_dim, group.value_dim) for group in engine.groups}
    if len(shapes) != 1:
        raise InvalidSpec(f"layers keep KV in different shapes or block sizes: {sorted(shapes)}")
    strange = sorted({group.kind for group in engine.groups} - {"full", "sliding"})
    if strange:
        raise InvalidSpec(f"KV of kind {', '.join(strange)} cannot be stored yet")
    ((tokens, heads, key_dim, value_dim),) = shapes
    known, base = _model(engine, model)
    layers = tuple(sorted(layer for group in engine.groups for layer in group.layers))
    made = sized(
        KVSpec(
            groups=(LayerGroup(layers=layers, kv_heads=heads, key_dim=key_dim, value_dim=value_dim),),
            dtype=engine.dtype,
            model=known if engine.ranks == 1 else f"{known} part {engine.rank + 1} of {engine.ranks}",
            vocabulary_size=base.vocabulary_size if base is not None else engine.vocabulary_size,
            rope=base.rope if base is not None else "",
            quantisation=_changes(engine),
            extent_blocks=1,
        )
    )
    windows = [group.window for group in engine.groups if group.window is not None]
    window = min(windows, default=None)
    if engine.format_name not in FORMATS:  # nobody but such an engine can read them
        return Ready(spec=undescribed(made, engine.format_name, tokens), window=window)
    spec = native(made, FORMATS[engine.format_name](tokens, heads, key_dim, value_dim), accept=accept)
    return Ready(spec=spec, canonical=made == base, window=window)


def _model(engine: Engine, model: str | None) -> tuple[str, KVSpec | None]:
    """What names the weights, and the spec that others than this engine have of them, where there is one."""
    directory = Path(engine.model)
    if not directory.is_dir():
        if model is None:
            raise InvalidSpec(
                f"{engine.model} is no local directory whose weights could be told from others; name them, with their "
                "revision, as holdfast.model in kv_connector_extra_config"
            )
        return model, None
    try:
        if model is not None:
            base = model_spec(read_json(directory / CONFIG_FILE), model, dtype=engine.dtype)
        else:
            base = checkpoint_spec(directory, engine.dtype)
    except InvalidSpec:
        return model or checkpoint_digest(directory), None
    return base.model, base


def _changes(engine: Engine) -> str:
    """What was changed of the checkpoint's KV when the engine was started; empty: nothing."""
    if engine.overrides is None:
        raise InvalidSpec("hf_overrides is a function: what it changes cannot be told; give them as an object")
    changes: dict[str, Any] = {}
    if engine.quantisation:
        changes["weights"] = engine.quantisation
    if engine.overrides:
        changes["overrides"] = dict(engine.overrides)
    if engine.media:
        changes["media"] = dict(engine.media)
    if engine.rope_type not in SETTLED_ROPES:
        changes["max_tokens"] = engine.max_tokens  # such a rotary embedding depends on it
    return json.dumps(changes, sort_keys=True, default=str) if changes else ""
