"""ModelIdentity: the KVSpec of a model in memory, which changes with anything that changes its KV.

A model loaded from a local checkpoint has the checkpoint's spec, as the built-in runner and vLLM have it, if its
weights are still those of the files, bit for bit. Any other has a digest over its parameters. Either is found out
once per model object; changes made to the model afterwards are looked for at each use.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kvstore.errors import InvalidRequest, InvalidSpec
from ...kvstore.spec import KVSpec
from ...ring_attention.config import ModelConfig, parse_config
from ...ring_attention.identity import CONFIG_FILE, read_json
from ...ring_attention.rope import frequencies
from ...ring_attention.weight_files import WeightFiles
from ..checkpoint_identity import checkpoint_spec, model_spec

SAMPLES: Final = 64  # elements of a tensor that are looked at again at each use
VOLATILE: Final = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
}  # of a config; no KV changes with them
GENERIC: Final = (  # what attribute maps give their usual names
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "vocab_size",
)
ADAPTER_STATE: Final = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # of PEFT's layers

_known: WeakKeyDictionary[PreTrainedModel, tuple[str, KVSpec]] = WeakKeyDictionary()
_finding = threading.Lock()


def spec_of_model(model: PreTrainedModel) -> KVSpec:
    """The KV that this model makes now, adapters and changed weights included.

    The first call reads all weights, and the files of a local checkpoint; later ones look at a few elements of each
    tensor, at versions and addresses. A change that they cannot see (single elements written through `.data`, forward
    hooks) needs a spec that the caller makes. Raises InvalidSpec where the config does not tell the KV's shape, and
    InvalidRequest for weights that are not in memory.
    """
    with _finding:
        marks = _marks(model)
        known = _known.get(model)
        if known is None or known[0] != marks:
            known = marks, _of_checkpoint(model) or _of_parameters(model)
            _known[model] = known
        return known[1]


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter and buffer, tied ones by each of their names."""
    found: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if tensor.is_meta:
            raise InvalidRequest(f"{name} is offloaded, so this model's weights cannot be told; give its spec")
        found[name] = tensor.detach()
    return found


def _adapter_state(model: PreTrainedModel) -> list[tuple[str, str, str]]:
    """Which adapters are at work and how strongly, which parameters do not show."""
    return [
        (name, field, repr(value))
        for name, module in model.named_modules()
        for field in ADAPTER_STATE
        if isinstance(value := getattr(module, field, None), bool | int | float | str | list | tuple | dict)
    ]


def _marks(model: PreTrainedModel) -> str:
    """What changes, for all practical purposes, when the model does."""
    digest = hashlib.blake2b(digest_size=16)
    samples: list[Tensor] = []
    for name, tensor in _tensors(model).items():
        version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch documents it, and has no other
        digest.update(repr((name, tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape))).encode())
        flat = tensor.reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLES)].to(torch.float32))
    if samples:
        digest.update(_bytes(torch.cat([sample.to(samples[0].device) for sample in samples])))
    digest.update(json.dumps([_config(model), _adapter_state(model)], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """The decoder's config.json, with the usual names of its fields."""
    config = model.config.get_text_config(decoder=True)
    named = {field: value for field in GENERIC if (value := getattr(config, field, None)) is not None}
    return {name: value for name, value in {**config.to_dict(), **named}.items() if name not in VOLATILE}


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _of_checkpoint(model: PreTrainedModel) -> KVSpec | None:
    """The spec of the local checkpoint that it was loaded from; None if there is none, or the model is another now."""
    directory = Path(model.name_or_path) if model.name_or_path else None
    if directory is None or not directory.is_dir():
        return None
    try:
        shape = _shape(read_json(directory / CONFIG_FILE))
        if shape != _shape(model.config.to_dict()):
            return None
        files = WeightFiles(directory, "cpu", model.dtype)
        spec = checkpoint_spec(directory, _dtype(model))
    except InvalidSpec:
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not {name for name, _ in model.named_parameters()} <= set(files) <= set(parameters):
        return None
    for name, file in files.items():
        if parameters[name].dtype != model.dtype or not torch.equal(parameters[name].detach().cpu(), file[:]):
            return None
    # What no file holds: a model that was cast as a whole has coarser frequencies than one that was loaded so.
    expected = frequencies(shape.rope, shape.head_dim)
    if any(not torch.equal(buffer.cpu(), expected) for buffer in model.buffers()):
        return None
    return spec


def _shape(raw: dict[str, Any]) -> ModelConfig:
    """What a config says of the forward pass."""
    return replace(parse_config(raw), dtype="", eos=())


def _of_parameters(model: PreTrainedModel) -> KVSpec:
    digest = hashlib.blake2b(digest_size=16, person=b"holdfast-memory")
    state = [type(model).__qualname__, _config(model), _adapter_state(model)]
    digest.update(json.dumps(state, sort_keys=True, default=repr).encode())
    for name, tensor in sorted(_tensors(model).items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return model_spec(_config(model), digest.hexdigest(), dtype=_dtype(model))


def _bytes(tensor: Tensor) -> bytes | memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
