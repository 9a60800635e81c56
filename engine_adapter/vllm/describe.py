"""Describe: what a worker's vLLM says of itself, as plain values. It reads vLLM's configuration and decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from .identity import CacheGroup, Engine

KINDS: Final = {"FullAttentionSpec": "full", "SlidingWindowSpec": "sliding", "MLAAttentionSpec": "latent"}
CPU_PAGES: Final = {  # by backend and instruction set
    ("CPU_ATTN", "vec"): "vllm-cpu-vec/1",
    ("CPU_ATTN", "vec16"): "vllm-cpu-vec/1",
    ("CPU_ATTN", "amx"): "vllm-cpu-amx/1",
}
FLASH_LAYOUTS: Final = {"LBNHC": "vllm-flash-nhd/1", "LBHNC": "vllm-flash-hnd/1"}
DRAFTS_WITHOUT_KV: Final = ("ngram", "ngram_gpu", "suffix")  # other drafts keep KV that our identity does not cover
# What else decides which KV a picture makes. A picture's hash knows only what its request says of it.
MEDIA_SETTINGS: Final = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_encoder_attn_dtype",
    "video_pruning_rate",
    "video_pruning_method",
)

Tensors = dict[int, tuple[int, torch.Tensor]]


def describe(config: Any, cache_config: Any, caches: Mapping[str, Any]) -> tuple[Engine, Tensors]:
    """The engine as values, and its page tensors by layer index, with their KV cache groups.

    `config` is vLLM's VllmConfig, `cache_config` its KVCacheConfig, `caches` what it registers: tensors, or lists.
    """
    model, parallel = config.model_config, config.parallel_config
    groups: list[CacheGroup] = []
    tensors: Tensors = {}
    refusals = _refusals(config)
    for number, group in enumerate(cache_config.kv_cache_groups):
        numbers = [_layer_number(name) for name in group.layer_names]
        layers = {layer: name for layer, name in zip(numbers, group.layer_names, strict=True) if layer is not None}
        if len(layers) != len(numbers) or tensors.keys() & layers.keys():
            refusals.append(f"layers cannot be told apart by their names, such as {group.layer_names[0]}")
            continue
        if missing := [name for name in layers.values() if name not in caches]:
            refusals.append(f"layers keep their KV elsewhere, such as {missing[0]}")
            continue
        if states := [name for name in layers.values() if not isinstance(caches[name], torch.Tensor)]:
            refusals.append(f"layers keep a state, not KV, such as {states[0]}")
            continue
        if any(caches[name].shape[0] != cache_config.num_blocks for name in layers.values()):
            refusals.append("the backend splits blocks; give --block-size a size that it takes whole")
        tensors |= {layer: (number, caches[name]) for layer, name in layers.items()}
        groups.append(_group(tuple(layers), group.kv_cache_spec))
    dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors.values()}
    backend, format_name = _backend(config, cache_config)
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    engine = Engine(
        model=model.model,
        dtype=", ".join(sorted(dtypes)),
        vocabulary_size=model.get_vocab_size(),
        groups=tuple(groups),
        format_name=format_name,
        backend=backend,
        quantisation=model.quantization or "",
        overrides=None if callable(model.hf_overrides) else model.hf_overrides,
        rope_type=str(rope.get("rope_type", "default" if not any(map(_is_object, rope.values())) else "several")),
        max_tokens=model.max_model_len,
        media=_media(model),
        rank=config.parallel_config.rank % parallel.tensor_parallel_size,
        ranks=parallel.tensor_parallel_size,
        refusals=tuple(refusals),
    )
    return engine, tensors


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _refusals(config: Any) -> list[str]:
    """What of this configuration the connector cannot serve."""
    parallel, model = config.parallel_config, config.model_config
    names = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
    found = [f"{name} {getattr(parallel, name)} is not supported yet" for name in names if getattr(parallel, name) > 1]
    draft = config.speculative_config
    if draft is not None and draft.method not in DRAFTS_WITHOUT_KV:
        found.append(f"speculative decoding by {draft.method} is not supported yet")
    if getattr(config, "weight_transfer_config", None) is not None:
        found.append("the weights of this engine change while it runs")
    if config.load_config.load_format == "dummy":
        found.append("the weights of this engine are made up (--load-format dummy)")
    if model.hf_config_path not in (None, model.model):
        found.append(f"the model's config is not the checkpoint's but {model.hf_config_path}'s")
    if model.runner_type != "generate":
        found.append(f"a {model.runner_type} model's KV is not kept")
    if _numbers_pictures(config):
        found.append(
            "vLLM numbers pictures instead of hashing them; leave out --no-enable-prefix-caching or "
            "--mm-processor-cache-gb 0"
        )
    if config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        found.append(f"--kv-cache-dtype {config.cache_config.cache_dtype} is not supported yet")
    return found


def _numbers_pictures(config: Any) -> bool:
    """Whether a picture is named by when it came: by the same names in every engine."""
    media = getattr(config.model_config, "multimodal_config", None)
    if media is None or media.language_model_only:
        return False
    return not media.mm_processor_cache_gb and not config.cache_config.enable_prefix_caching


def _media(model: Any) -> dict[str, Any]:
    """How this engine prepares pictures; empty for a model of text, or as the model does by itself."""
    media = getattr(model, "multimodal_config", None)
    found = {name: getattr(media, name, None) for name in MEDIA_SETTINGS}
    if not found["video_pruning_rate"]:
        del found["video_pruning_method"]
    return {name: value for name, value in found.items() if value}


def _layer_number(name: str) -> int | None:
    """The only number in a layer's name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def _group(layers: tuple[int, ...], spec: Any) -> CacheGroup:
    kind = type(spec).__name__
    return CacheGroup(
        kind=KINDS.get(kind, kind),
        layers=layers,
        block_tokens=spec.block_size,
        heads=getattr(spec, "num_kv_heads", 0),
        key_dim=getattr(spec, "head_size", 0),
        value_dim=getattr(spec, "head_size_v", 0),
        window=getattr(spec, "sliding_window", None) if kind == "SlidingWindowSpec" else None,
    )


def _backend(config: Any, cache_config: Any) -> tuple[str, str | None]:
    """The attention backend by name, and the name of its page format, where all layers have one."""
    found = set()
    for group in cache_config.kv_cache_groups:
        for name in group.layer_names:
            layer = config.compilation_config.static_forward_context[name]
            found.add((layer.get_attn_backend().get_name(), getattr(layer, "isa", "")))
    backends = ", ".join(sorted(" ".join(filter(None, pair)) for pair in found))
    if len(found) == 1 and (only := found.pop()) in CPU_PAGES:
        return backends, CPU_PAGES[only]
    if backends.split(" ")[0] == "FLASH_ATTN" and "," not in backends:
        return backends, FLASH_LAYOUTS.get(cache_config.kv_cache_layout)
    return backends, None
