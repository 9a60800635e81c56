"""RunnerPlan: what a runner will be, from its options and its checkpoint's config: shape, rows, tokens that fit.

No torch: the ranks load it, in processes of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from .engine_adapter.runner_wire import RunnerFacts
from .kvstore.document import checked_name
from .kvstore.errors import InvalidRequest, Unavailable
from .kvstore.gpus import gpus
from .kvstore.machine import Machine
from .kvstore.sizes import about_size
from .kvstore.spec import KVSpec
from .ring_attention.config import ModelConfig
from .ring_attention.identity import digest_of, read_config, spec_of, weight_files
from .ring_attention.tokenizer import Tokenizer, load_tokenizer

CPU_SHARE: Final = 0.25  # of the memory that is free, for the rows of all ranks
GPU_SHARE: Final = 0.8  # of what the weights leave: activations and the kernels' own memory need the rest
ROWS_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """What the command line says. `rows` and `hbm_bytes` are per rank; one of them at most. 0 threads: a fair share."""

    model: Path
    cp: int
    tp: int
    device: str
    name: str
    tenant: str
    rows: int | None
    hbm_bytes: int | None
    threads: int
    kernel: str = ""
    communicator: str = "auto"
    strategy: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerPlan:
    """What the group's processes and the service are made from."""

    facts: RunnerFacts
    spec: KVSpec
    tokenizer: Tokenizer
    eos: tuple[int, ...]

    @classmethod
    def of(cls, options: RunnerOptions, say: Callable[[str], None]) -> Self:
        """Read the checkpoint. Raises InvalidRequest, or InvalidSpec for a checkpoint that is none of ours."""
        checked_name(options.tenant, "tenant")
        model = options.model.resolve()
        if not model.is_dir():
            raise InvalidRequest(f"{options.model} is no directory; --model takes one with config.json and safetensors")
        config = read_config(model)
        _check_degrees(config, options)
        tokenizer = load_tokenizer(model, config.vocabulary_size)
        say(f"reading {model}")
        spec = spec_of(config, digest_of(model))
        row_bytes = spec.bytes_per_token // min(options.tp, config.kv_heads)
        rows = options.rows if options.rows is not None else _rows(options, model, row_bytes)
        facts = RunnerFacts(
            group=options.name,
            tenant=options.tenant,
            pid=os.getpid(),
            model=str(model),
            shape=described(config),
            kv_bytes_per_token=spec.bytes_per_token,
            cp=options.cp,
            tp=options.tp,
            device=options.device,
            threads=options.threads,
            kernel=options.kernel,
            communicator=options.communicator,
            strategy=options.strategy,
            rows=rows,
            hbm_bytes=rows * row_bytes,
            capacity_tokens=rows * options.cp,
        )
        return cls(facts=facts, spec=spec, tokenizer=tokenizer, eos=config.eos)


def described(config: ModelConfig) -> str:
    """A model's shape, in words."""
    window = f", window {config.window}" if config.window is not None else ""
    return (
        f"{config.architecture.removesuffix('ForCausalLM')}, {config.layers} layers, {config.heads} heads "
        f"({config.kv_heads} kv) of {config.head_dim}{window}, vocabulary {config.vocabulary_size}, {config.dtype}"
    )


def _check_degrees(config: ModelConfig, options: RunnerOptions) -> None:
    for what, number in (("heads", config.heads), ("intermediate size", config.intermediate_size)):
        if number % options.tp:
            raise InvalidRequest(f"--tp {options.tp} does not divide the model's {what} of {number}")
    if config.kv_heads % options.tp and options.tp % config.kv_heads:
        raise InvalidRequest(f"--tp {options.tp} and the model's {config.kv_heads} kv heads do not divide each other")


def _rows(options: RunnerOptions, model: Path, row_bytes: int) -> int:
    """Token rows of a rank. Raises InvalidRequest when there would be none."""
    ranks = options.cp * options.tp
    if options.hbm_bytes is not None:
        size_bytes, why = options.hbm_bytes, "--hbm"
    elif options.device == "cpu":
        size_bytes, why = int(Machine().available_memory() * CPU_SHARE) // ranks, "a quarter of the free memory"
    else:
        size_bytes, why = _gpu_bytes(model, options.tp, ranks), "what the GPUs have free"
    if size_bytes < row_bytes:
        raise InvalidRequest(f"{about_size(max(0, size_bytes))} per rank ({why}) do not hold one token's KV: say --hbm")
    return min(size_bytes // row_bytes, ROWS_MAX)


def _gpu_bytes(model: Path, tp: int, ranks: int) -> int:
    """Bytes for a rank's rows: of its part of the smallest GPU's free memory, what its weights leave."""
    try:
        free = [gpu.hbm_free_bytes for gpu in gpus() if gpu.hbm_free_bytes is not None]
    except Unavailable as error:
        raise InvalidRequest(
            f"say --hbm or --rows: how much memory the GPUs have is not known ({error.message})"
        ) from error
    if not free:
        raise InvalidRequest("say --hbm or --rows: the GPUs do not tell how much memory they have")
    weights = sum(path.stat().st_size for path in weight_files(model)) // tp
    return int((min(free) // -(-ranks // len(free)) - weights) * GPU_SHARE)
