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
    """What the forward pass needs of config.json. Biases are found in the weights themselves."""

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

    @property
    def normalises_heads(self) -> bool:
        """Whether queries and keys get an RMSNorm per head before the rotary embedding."""
        return self.architecture == "Qwen3ForCausalLM"


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The config of a supported model. Raises InvalidSpec naming what is unsupported or missing."""
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise InvalidSpec(f"unsupported architecture {architecture!r}; use one of {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(raw, architecture)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise InvalidSpec(f"unsupported dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    heads, hidden_size = _integer(raw, "num_attention_heads"), _integer(raw, "hidden_size")
    config = ModelConfig(
        architecture=architecture,
        vocabulary_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        layers=_integer(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden_size // heads),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(raw),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise InvalidSpec(f"{heads} heads do not group over {config.kv_heads} kv heads of an even head_dim")
    return config


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value < 1:
        raise InvalidSpec(f"config.json needs a positive integer {name!r}, not {value!r}")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise InvalidSpec(f"unsupported hidden_act {activation!r}; only silu is supported")
    # Qwen configs carry a window that is off unless use_sliding_window says so; Mistral's is on
    # when set.
    windowed = raw.get("use_sliding_window", architecture == "MistralForCausalLM")
    if windowed and raw.get("sliding_window") is not None:
        raise InvalidSpec(f"unsupported sliding_window {raw['sliding_window']}; only full attention is supported")
    other = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise InvalidSpec(f"unsupported layer_types {', '.join(other)}; only full attention is supported")
    quantisation = raw.get("quantization_config")
    if quantisation:
        raise InvalidSpec(f"unsupported quantization_config {quantisation.get('quant_method', '?')!r}")


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
