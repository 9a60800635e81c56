"""HoldfastCache: a Transformers cache whose first tokens come from a document, each layer when it is first touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...kvstore.errors import HoldfastError, InvalidRequest
from ...kvstore.spec import KVSpec
from ..attachment import Attachment, LayerKV
from ..pages import Array

BITS: Final = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8}  # what numpy lacks, by torch's type of its size
UNSIGNED: Final = {"bfloat16": np.uint16}


def as_array(tensor: Tensor) -> Array:
    """A tensor in CPU memory as the array that the store knows it by; no copy."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    array: Array = tensor.view(BITS.get(dtype, tensor.dtype)).numpy()
    return array.view(UNSIGNED[dtype]) if dtype in UNSIGNED else array


class HoldfastLayer(DynamicLayer):
    """A layer that begins with `waiting` tokens of a document and grows from there. For one sequence."""

    def __init__(self, waiting: int, fetch: Callable[[Tensor, Tensor], None]) -> None:
        """`fetch` fills key and value, [1, kv heads, waiting, dim] each."""
        super().__init__()
        self._waiting = waiting
        self._fetch = fetch

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See CacheLayerMixin. The first time memory is made for both the document's tokens and the new ones."""
        if self.is_initialized:
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        self._begin(key_states, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See CacheLayerMixin: the document's tokens alone."""
        self._begin(key_states[:, :, :0], value_states[:, :, :0])

    def _begin(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[0] != 1:
            raise InvalidRequest(
                f"this cache is for one sequence, not for a batch of {key_states.shape[0]}, which beams and several "
                "answers at once are, too: generate these without it"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        made = []
        for states in (key_states, value_states):
            _, heads, tokens, dim = states.shape
            room = torch.empty((1, heads, self._waiting + tokens, dim), dtype=states.dtype, device=states.device)
            room[:, :, self._waiting :] = states
            made.append(room)
        if self._waiting:
            self._fetch(*(room.detach()[:, :, : self._waiting] for room in made))
        self.keys, self.values = made
        self._waiting = 0
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """See CacheLayerMixin: what waits is counted, so that nobody computes it."""
        return self._waiting or int(super().get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """See DynamicLayer: remove that many tokens, as a negative number, from the end."""
        if not self._waiting:
            super().crop(tokens_to_remove)
            return
        if tokens_to_remove > 0:
            raise InvalidRequest("crop takes the tokens to remove as a negative number")
        self._waiting = max(0, self._waiting + tokens_to_remove)

    def reset(self) -> None:
        """See CacheLayerMixin: an empty layer."""
        self._waiting = 0
        super().reset()


class _Layers:
    """The layers of an attachment, in whatever order they are asked for; given back after the last one."""

    def __init__(
        self, attachment: Attachment, release: Callable[[], None], count: int, deadline_seconds: float
    ) -> None:
        self._attachment = attachment
        self._layers: Iterator[LayerKV] = attachment.layers(deadline_seconds=deadline_seconds)
        self._release = release
        self._passed: dict[int, LayerKV] = {}
        self._left = count
        self._exposed_ns = 0

    def fill(self, index: int, key: Tensor, value: Tensor) -> None:
        """Wait for a layer and copy its first tokens. Raises as Attachment.layers does."""
        began_ns = time.perf_counter_ns()
        while index not in self._passed:
            layer = next(self._layers)
            self._passed[layer.index] = layer
        self._exposed_ns += time.perf_counter_ns() - began_ns
        _copy(self._passed.pop(index), self._attachment.spec, key, value)
        self._left -= 1
        if not self._left:
            with suppress(HoldfastError):  # the receipt is for people
                self._attachment.report(exposed_ns=self._exposed_ns)
            self._release()


def _copy(layer: LayerKV, spec: KVSpec, key: Tensor, value: Tensor) -> None:
    """Copy the first tokens of a layer: on the CPU straight out of shared memory, to others by way of pinned memory."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    is_direct = key.device.type == "cpu" and key.dtype == dtype
    stages = [
        into if is_direct else torch.empty(into.shape, dtype=dtype, pin_memory=key.device.type == "cuda")
        for into in (key, value)
    ]
    arrays = [as_array(stage)[0] for stage in stages]
    stop = key.shape[2]
    if layer.tokens == (0, stop):
        layer.copy_into(*arrays)
    else:
        _copy_front(layer, arrays, stop)
    for into, stage in zip((key, value), stages, strict=True):
        if into is not stage:
            into.copy_(stage)  # waits: the stage is not ours for longer


def _copy_front(layer: LayerKV, arrays: Sequence[Array], stop: int) -> None:
    """Copy tokens [0, stop) of a layer that has more."""
    for piece in layer.pieces:
        for array, source in zip(arrays, (piece.key, piece.value), strict=True):
            rows = array[:, piece.start : min(stop, piece.start + source.shape[1])]
            np.copyto(rows, source[:, : rows.shape[1]])
        if piece.start + piece.key.shape[1] >= stop:
            return


class HoldfastCache(Cache):
    """A cache that starts with the KV of the first `reused_tokens` tokens of a prompt; see `attach`.

    It gives its lease back when the last layer has been read, or at the end of its `with` block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        attachment: Attachment | None,
        release: Callable[[], None],
        on_failure: Callable[[HoldfastError], None],
        deadline_seconds: float,
    ) -> None:
        """`tokens` [1, n] are those that the attachment begins with. `on_failure` hears of it, or raises.

        A layer that takes longer than the deadline is a failure.
        """
        kinds = refuse_unknown_layers(model)
        self.reused_tokens: int = tokens.shape[1] if attachment is not None else 0
        self._model = model
        self._tokens = tokens
        self._release = release
        self._on_failure = on_failure
        self._attached = _Layers(attachment, release, kinds, deadline_seconds) if attachment is not None else None
        self._computed: DynamicCache | None = None
        super().__init__(layers=[HoldfastLayer(self.reused_tokens, self._filling(index)) for index in range(kinds)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise InvalidRequest("this cache is not copied: attach once more for each answer, which reads it again")

    def close(self) -> None:
        """Give the lease back. Layers that were not touched by then are computed if they are touched after all."""
        self._attached = None
        self._release()

    @property
    def prefix(self) -> Tensor:
        """The tokens that it began with: [1, reused_tokens]."""
        return self._tokens[:, : self.reused_tokens]

    def _filling(self, index: int) -> Callable[[Tensor, Tensor], None]:
        def fill(key: Tensor, value: Tensor) -> None:
            if self._attached is not None:
                try:
                    self._attached.fill(index, key, value)
                except HoldfastError as error:
                    self.close()
                    self._on_failure(error)
                else:
                    return
            self._compute(index, key, value)

        return fill

    def _compute(self, index: int, key: Tensor, value: Tensor) -> None:
        """The layers that cannot be read, by a prefill of their tokens in between: those read so far stay right."""
        if self._computed is None:
            computed = DynamicCache()
            with torch.no_grad():
                self._model.get_decoder()(input_ids=self.prefix, past_key_values=computed, use_cache=True)
            self._computed = computed
        layer = self._computed.layers[index]
        key.copy_(layer.keys[:, :, : key.shape[2]])
        value.copy_(layer.values[:, :, : value.shape[2]])
        layer.reset()  # its memory is not needed twice


def refuse_unknown_layers(model: PreTrainedModel) -> int:
    """How many layers the model's cache has. Raises InvalidRequest for kinds of which a prefix cannot be stored.

    Layers with a window keep all of their KV here: masks hide what is too old.
    """
    if model.config.is_encoder_decoder:
        raise InvalidRequest(f"{type(model).__name__} is an encoder with a decoder; only decoders can reuse documents")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InvalidRequest("an adapter that puts virtual tokens in front of a prompt cannot reuse documents")
    for kind in _ropes(model):
        if "dynamic" in kind or kind == "longrope":  # as Transformers tells them
            raise InvalidRequest(
                f"the rotary embedding ({kind}) of {type(model).__name__} changes with the length of a prompt, and so "
                "does the KV of every token; such models cannot reuse documents"
            )
    layers = DynamicCache(config=model.config).layers
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InvalidRequest(
                f"layer {index} of {type(model).__name__} keeps a {type(layer).__name__}, whose state is not KV by "
                "token; only models with attention in all layers can reuse documents"
            )
    return len(layers)


def _ropes(model: PreTrainedModel) -> set[str]:
    """The kinds of its rotary embeddings, which may differ from layer to layer."""
    told = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return {str(one.get("rope_type")) for one in (told, *told.values()) if isinstance(one, dict)}
