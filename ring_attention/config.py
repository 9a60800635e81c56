"""ModelConfig: the shape of a decoder, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final

from ..kvstore.errors import InvalidSpec

ARCHITECTURES: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DTYPES: Final = ("float32", "bfloat16", "float16")
SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"
ROPE_KINDS: Final = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `factor` stretches positions; the rest is Llama 3's blend of both."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the forward pass needs of config.json. Biases are found in the weights themselves.

    `window`: in layers other than `full_layers` the query at position p sees keys at p - window < k <= p.
    `eos`: tokens that end an answer.
    """

    architecture: str = "LlamaForCausalLM"
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    dtype: str = "float32"
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window in tokens by layer; None sees everything before."""
        return tuple(None if layer in self.full_layers else self.window for layer in range(self.layers))

    @property
    def has_layer_types(self) -> bool:
        """Whether each layer may have a window or not, where others have it in all layers or none."""
        return self.architecture.startswith("Qwen")

    @property
    def normalises_heads(self) -> bool:
        """Whether queries and keys get an RMSNorm per head before the rotary embedding."""
        return self.architecture == "Qwen3ForCausalLM"


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The config of a supported model. Raises InvalidSpec naming what is unsupported or missing."""
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "none"
    if architecture not in ARCHITECTURES:
        raise InvalidSpec(f"unsupported architecture {architecture!r}; use one of {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(raw)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise InvalidSpec(f"unsupported dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    heads, hidden_size = _integer(raw, "num_attention_heads"), _integer(raw, "hidden_size")
    layers = _integer(raw, "num_hidden_layers")
    window, full_layers = _parse_windows(raw, architecture, layers)
    config = ModelConfig(
        architecture=architecture,
        vocabulary_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=_integer(raw, "num_key_value_heads", heads),
        head_dim=_integer(raw, "head_dim", hidden_size // heads),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_parse_rope(raw),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
        window=window,
        full_layers=full_layers,
        eos=parse_eos(raw),
    )
    if config.heads % config.kv_heads or config.head_dim < 2 or config.head_dim % 2:
        raise InvalidSpec(f"{heads} heads do not group over {config.kv_heads} kv heads of an even head_dim")
    return config


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:  # a bool is none
        raise InvalidSpec(f"config.json needs a positive integer {name!r}, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value: Any = raw.get(name)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value < inf:
        raise InvalidSpec(f"config.json needs a positive number {name!r}, not {value!r}")
    return float(value)


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict | None):
        raise InvalidSpec(f"config.json needs an object {name!r}, not {value!r}")
    return value or {}


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise InvalidSpec(f"unsupported hidden_act {activation!r}; only silu is supported")
    quantisation = _object(raw, "quantization_config")
    if quantisation:
        raise InvalidSpec(f"unsupported quantization_config {quantisation.get('quant_method', '?')!r}")


def _parse_windows(raw: Mapping[str, Any], architecture: str, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers without it, as the library of the checkpoint format reads them, defaults included.

    Mistral: every layer, unless the window is null. Qwen: off unless `use_sliding_window`; then `layer_types`, or
    every layer from `max_window_layers`. Llama has none.
    """
    mistral, llama = architecture == "MistralForCausalLM", architecture == "LlamaForCausalLM"
    windowed = mistral or bool(raw.get("use_sliding_window"))
    size = raw.get("sliding_window", None if llama else 4096) if windowed else None
    if size is not None and (type(size) is not int or size < 1 or llama):
        raise InvalidSpec(f"unsupported sliding_window {size!r} in {architecture}")
    first = 0 if mistral else raw.get("max_window_layers", 28)
    types = raw.get("layer_types")
    if type(first) is not int or not isinstance(types, list | None):
        raise InvalidSpec(f"unsupported max_window_layers {first!r} or layer_types {types!r}")
    usual = [SLIDING if size is not None and layer >= first else FULL for layer in range(layers)]
    types = types or usual
    unknown = [str(kind) for kind in types if kind not in ((SLIDING, FULL) if size is not None else (FULL,))]
    if unknown or len(types) != layers or (mistral and types != usual):
        raise InvalidSpec(
            f"unsupported layer_types {', '.join(unknown[:3] or types)} with {layers} layers and sliding_window {size}"
        )
    full = tuple(layer for layer, kind in enumerate(types) if kind == FULL)
    return (size, full) if SLIDING in types else (None, ())


def parse_eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The `eos_token_id` of a config.json or generation_config.json: one, several or none. Raises InvalidSpec."""
    found = raw.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise InvalidSpec(f"eos_token_id is a token id or a list of them, not {found!r}")
    return tuple(ids)


def _parse_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    fields = _object(raw, "rope_scaling") | _object(raw, "rope_parameters")
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise InvalidSpec(f"unsupported rope type {kind!r}; use one of {', '.join(ROPE_KINDS)}")
    rotated = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise InvalidSpec(f"unsupported partial_rotary_factor {rotated}; only 1.0 is supported")
    theta = _number(fields, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    stretched = RopeConfig(theta=theta, kind=kind, factor=_number(fields, "factor"))
    if kind == "linear":
        return stretched
    blended = replace(
        stretched,
        low_freq_factor=_number(fields, "low_freq_factor"),
        high_freq_factor=_number(fields, "high_freq_factor"),
        original_positions=_integer(fields, "original_max_position_embeddings"),
    )
    if blended.low_freq_factor == blended.high_freq_factor:
        raise InvalidSpec("rope type 'llama3' needs a low_freq_factor below its high_freq_factor")
    return blended
