"""ModelConfig: the shape of a decoder, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    architecture = (raw.get("architectures") or ["none"])[0]
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
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden_size // heads),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(raw),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
        window=window,
        full_layers=full_layers,
        eos=parse_eos(raw),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise InvalidSpec(f"{heads} heads do not group over {config.kv_heads} kv heads of an even head_dim")
    return config


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value < 1:
        raise InvalidSpec(f"config.json needs a positive integer {name!r}, not {value!r}")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise InvalidSpec(f"unsupported hidden_act {activation!r}; only silu is supported")
    quantisation = raw.get("quantization_config")
    if quantisation:
        raise InvalidSpec(f"unsupported quantization_config {quantisation.get('quant_method', '?')!r}")


def _parse_windows(raw: Mapping[str, Any], architecture: str, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers without it, as the library of the checkpoint format reads them, defaults included.

    Mistral: every layer, unless the window is null. Qwen: off unless `use_sliding_window`; then `layer_types`, or
    every layer from `max_window_layers`. Llama has none.
    """
    mistral, llama = architecture == "MistralForCausalLM", architecture == "LlamaForCausalLM"
    windowed = bool(raw.get("use_sliding_window", mistral))
    size = raw.get("sliding_window", None if llama else 4096) if windowed else None
    if size is not None and (not isinstance(size, int) or size < 1 or llama):
        raise InvalidSpec(f"unsupported sliding_window {size!r} in {architecture}")
    first = 0 if mistral else int(raw.get("max_window_layers", 28))
    usual = [SLIDING if size is not None and layer >= first else FULL for layer in range(layers)]
    types = raw.get("layer_types") or usual
    unknown = sorted(set(types) - ({SLIDING, FULL} if size is not None else {FULL}))
    if unknown or len(types) != layers or (mistral and types != usual):
        raise InvalidSpec(
            f"unsupported layer_types {', '.join(unknown or types)} with {layers} layers and sliding_window {size}"
        )
    full = tuple(layer for layer, kind in enumerate(types) if kind == FULL)
    return (size, full) if SLIDING in types else (None, ())


def parse_eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The `eos_token_id` of a config.json or generation_config.json: one, several or none. Raises InvalidSpec."""
    found = raw.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in ids):
        raise InvalidSpec(f"eos_token_id is a token id or a list of them, not {found!r}")
    return tuple(ids)


def _parse_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    fields = dict(raw.get("rope_scaling") or {})
    fields |= raw.get("rope_parameters") or {}
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise InvalidSpec(f"unsupported rope type {kind!r}; use one of {', '.join(ROPE_KINDS)}")
    rotated = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise InvalidSpec(f"unsupported partial_rotary_factor {rotated}; only 1.0 is supported")
    theta = float(fields.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in needed if not isinstance(fields.get(name), int | float)]
    if missing:
        raise InvalidSpec(f"rope type {kind!r} needs {', '.join(missing)}")
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=float(fields["factor"]))
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(fields["factor"]),
        low_freq_factor=float(fields["low_freq_factor"]),
        high_freq_factor=float(fields["high_freq_factor"]),
        original_positions=int(fields["original_max_position_embeddings"]),
    )
