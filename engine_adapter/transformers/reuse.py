"""Reuse: a prompt's KV out of the store before `generate`, and into it afterwards."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...kvstore.document import WritePolicy
from ...kvstore.errors import (
    DocumentNotFound,
    DocumentTooLarge,
    HoldfastError,
    InvalidRequest,
    PrefixNotFound,
    ProtocolError,
    SpecMismatch,
)
from ...kvstore.keys import Extras
from ...kvstore.spec import KVSpec
from ..api import Store
from ..attachment import Attachment
from ..pages import PageFormat, native
from .cache import HoldfastCache, as_array, refuse_unknown_layers
from .model_identity import spec_of_model

LOG: Final = logging.getLogger("holdfast")

PLACEHOLDER: Final = re.compile(r"(image|video|audio|speech)\w*token\w*_(id|index)")  # of configs

Ids = Tensor | Sequence[int] | npt.NDArray[np.integer]


class Trouble(StrEnum):
    """What happens when the store fails: gone, full, corrupt."""

    RECOMPUTE = "recompute"  # the model computes; one line in the log for each kind of failure
    RAISE = "raise"


_told: set[str] = set()  # kinds of failures; there are as many as classes of errors


def _tell(error: HoldfastError) -> None:
    if error.code not in _told:
        _told.add(error.code)
        LOG.warning("computing without the KV cache of Holdfast, here and wherever this happens again: %s", error)


def _is_mistake(error: HoldfastError) -> bool:
    """Whether the caller asked for something wrong, in contrast to the store failing."""
    return isinstance(error, InvalidRequest | SpecMismatch) and not isinstance(error, DocumentTooLarge | ProtocolError)


def attach(
    store: Store,
    model: PreTrainedModel,
    input_ids: Ids,
    *,
    name: str | None = None,
    spec: KVSpec | None = None,
    extras: Extras | None = None,
    page_formats: Sequence[PageFormat] = (),
    trouble: Trouble = Trouble.RECOMPUTE,
    deadline_seconds: float = 60.0,
) -> HoldfastCache:
    """A cache with the KV of the longest prefix of `input_ids` that the store has, but for the last token at least.

    `input_ids` is one sequence, [n] or [1, n], without padding; give all of it to `generate`, and the cache as
    `past_key_values`. Each layer is copied when it is first touched, while later ones may still be on their way from
    NVMe; after the last one, or at the end of a `with` block, the lease is given back. Nothing found is an empty cache.

    It is looked for in whole blocks, among all documents of this model; with `name` also to the last token of that
    document, whatever engine stored it. `page_formats`: engines' formats in which to look, too. `extras`: what KV
    depends on besides tokens, as pictures behind placeholder tokens, by the index of the block of 64 tokens where it
    begins; then only canonical documents are found. `spec` is the model's identity where the caller knows better than
    `spec_of_model`. The deadline is for finding it, and for each layer.

    Raises InvalidRequest for a batch, for padding, for pictures without extras, and for a model whose layers keep
    something else than KV, or KV that changes with the length of a prompt; SpecMismatch when the named document is
    another model's; what the store cannot do only under `trouble="raise"`.
    """
    tokens = row(input_ids)
    _check_kind(model, tokens, extras)
    wanted = spec or spec_of_model(model)
    raises = Trouble(trouble) is Trouble.RAISE
    stack = ExitStack()
    attachment: Attachment | None = None
    with stack:
        try:
            place, upto = _place(store, wanted, tokens, extras, name, page_formats)
            attachment = stack.enter_context(
                store.attach_prefix(place, tokens[:upto], extras=extras, deadline_seconds=deadline_seconds)
            )
            stack = stack.pop_all()
        except PrefixNotFound:
            pass
        except HoldfastError as error:
            if raises or _is_mistake(error):
                raise
            _tell(error)
    reused = 0 if attachment is None else min(attachment.tokens[1], len(tokens) - 1)
    if not reused:
        stack.close()
        attachment = None

    def failed(error: HoldfastError) -> None:
        if raises:
            raise error
        _tell(error)

    prefix = torch.as_tensor(tokens[:reused].astype(np.int64), device=model.device)[None]
    return HoldfastCache(model, prefix, attachment, stack.close, failed, deadline_seconds)


def _place(
    store: Store,
    spec: KVSpec,
    tokens: npt.NDArray[np.integer],
    extras: Extras | None,
    name: str | None,
    formats: Sequence[PageFormat],
) -> tuple[KVSpec, int]:
    """The key space that has the longest prefix, and how many of the tokens to look for there. Raises SpecMismatch."""
    places = [(space, len(tokens)) for space in (spec, *(native(spec, page_format) for page_format in formats))]
    if name is not None:
        with suppress(DocumentNotFound):
            view = store.document(name)
            # Exactly as many tokens as it has: its last block may be part-filled, and then has a key of its own.
            count = min(view.token_count, len(tokens))
            theirs = spec if view.fingerprint == spec.fingerprint().hex() else _spec_of(store, name)
            if theirs.canonical() != spec.canonical():
                raise SpecMismatch(f"{name} is KV of model {theirs.model}; this model is {spec.model}")
            places.insert(0, (theirs, count))
    if extras:  # they are by block, and engines' blocks are others
        places = [place for place in places if place[0].block_tokens == spec.block_tokens]
    if len(places) == 1:
        return places[0]
    return max(places, key=lambda place: store.lookup(place[0], tokens[: place[1]], extras=extras).token_count)


def _check_kind(model: PreTrainedModel, tokens: npt.NDArray[np.integer], extras: Extras | None) -> None:
    """Raises InvalidRequest where tokens do not tell KV."""
    refuse_unknown_layers(model)
    if (padding := _hidden(model)) is not None and padding in tokens:
        raise InvalidRequest(
            f"input_ids have the padding token {padding}, which `generate` hides and does not count, so that what "
            "stands behind it is elsewhere: give them without padding"
        )
    if extras:
        return
    placeholders = {
        token: field
        for field, token in model.config.to_dict().items()
        if PLACEHOLDER.fullmatch(field) and isinstance(token, int)
    }
    for token in set(placeholders).intersection(tokens.tolist()):
        raise InvalidRequest(
            f"input_ids have {placeholders[token]} {token}: their KV depends on what stands behind it; give `extras`, "
            "a digest of each picture or sound by the block where it begins"
        )


def _hidden(model: PreTrainedModel) -> int | None:
    """The token that `generate` takes for padding where it stands, if there is one."""
    told = getattr(model, "generation_config", None)
    padding, ends = getattr(told, "pad_token_id", None), getattr(told, "eos_token_id", None)
    return None if padding in (ends if isinstance(ends, list) else [ends]) else padding


def _spec_of(store: Store, name: str) -> KVSpec:
    with store.attach(name, tokens=(0, 1)) as document:
        return document.spec


def save(
    store: Store,
    model: PreTrainedModel,
    input_ids: Ids,
    cache: Cache,
    *,
    name: str | None = None,
    spec: KVSpec | None = None,
    extras: Extras | None = None,
    write_policy: WritePolicy = WritePolicy.AUTO,
    ttl_seconds: float | None = None,
    deadline_seconds: float = 60.0,
) -> int:
    """Store the KV of `input_ids` that a prefill, or `generate`, has left in `cache`; returns how many tokens have it.

    `input_ids` is one sequence without padding, and what the cache was made from; a cache that is shorter than it
    (the last token generated has no KV yet) stores that front of it, a longer one only what was asked for. Only what
    the store lacks is copied. Without a name it is found by its tokens, and by `extras` (see `attach`).

    Raises InvalidRequest as `attach` does, and for layers that have dropped or never had KV of these tokens; and what
    Store.ingest raises.
    """
    tokens = row(input_ids)
    count = min(len(tokens), int(cache.get_seq_length()))
    _check_kind(model, tokens, extras)
    wanted = spec or spec_of_model(model)
    if refuse_unknown_layers(model) != len(cache.layers):
        raise InvalidRequest(f"this cache has {len(cache.layers)} layers; it is another model's, or still empty")
    if isinstance(cache, HoldfastCache):
        front = cache.prefix[0, :count].cpu().numpy()
        if not np.array_equal(front, tokens[: len(front)]):
            raise InvalidRequest("this cache began with other tokens")
    held = [_held(index, layer.keys, layer.values, count) for index, layer in enumerate(cache.layers)]
    with store.ingest(
        name,
        wanted,
        tokens[:count],
        write_policy=write_policy,
        ttl_seconds=ttl_seconds,
        extras=extras,
        deadline_seconds=deadline_seconds,
    ) as writer:
        for start, stop in writer.missing:
            for layer, both in enumerate(held):
                key, value = (as_array(states[0, :, start:stop].cpu()) for states in both)
                writer.write(layer, start, key, value)
    return count


def _held(index: int, keys: Tensor | None, values: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """A layer's KV of the first `count` tokens. Raises InvalidRequest."""
    if not count or keys is None or values is None or keys.ndim != 4:
        raise InvalidRequest(f"layer {index} of the cache is empty; save after the prefill")
    if keys.shape[0] != 1:
        raise InvalidRequest(f"the cache is of a batch of {keys.shape[0]}; documents are one sequence each")
    if keys.shape[2] < count:
        raise InvalidRequest(
            f"layer {index} of the cache has only the last {keys.shape[2]} of {count} tokens: it has a window; use a "
            "cache of `attach`, which keeps all"
        )
    return keys.detach(), values.detach()


@contextmanager
def cached(
    store: Store,
    model: PreTrainedModel,
    input_ids: Ids,
    *,
    name: str | None = None,
    spec: KVSpec | None = None,
    extras: Extras | None = None,
    page_formats: Sequence[PageFormat] = (),
    trouble: Trouble = Trouble.RECOMPUTE,
) -> Iterator[HoldfastCache]:
    """A cache as `attach` gives it; at the end of the block the prompt is stored, if it is not yet.

    An error in the block stores nothing. A store that fails, before or after, costs the reuse only.
    """
    wanted = spec or spec_of_model(model)
    with attach(
        store, model, input_ids, name=name, spec=wanted, extras=extras, page_formats=page_formats, trouble=trouble
    ) as cache:
        yield cache
        if cache.get_seq_length() <= cache.reused_tokens:
            return  # nothing was computed
        try:
            save(store, model, input_ids, cache, name=name, spec=wanted, extras=extras)
        except HoldfastError as error:
            if Trouble(trouble) is Trouble.RAISE or _is_mistake(error):
                raise
            _tell(error)


def row(input_ids: Ids) -> npt.NDArray[np.integer]:
    """The token ids of one sequence, [n]. Raises InvalidRequest."""
    ids = input_ids.detach().cpu().numpy() if isinstance(input_ids, Tensor) else np.asarray(input_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise InvalidRequest(f"input_ids are the tokens of one sequence, [n] or [1, n], not {ids.dtype} {ids.shape}")
    return ids
