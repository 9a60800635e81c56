"""HoldfastTier below vLLM's own offloading: real engines, one after the other, and a daemon that dies between."""

from __future__ import annotations

import numpy as np
import pytest
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import write_checkpoint
from vllm_engine import Engine, Prompt

from daemon_process import DaemonProcess, until

# float32: loading a prefix instead of computing it changes no bit of an answer for want of precision.
MODEL = ModelConfig(
    vocabulary_size=512, hidden_size=128, intermediate_size=256, layers=4, heads=4, kv_heads=2, head_dim=32,
    dtype="float32",
)  # fmt: skip
BLOCK = 32
CHUNKS = 12  # of a prompt
CHUNK_BYTES = 4 * 2 * 2 * 32 * 4 * BLOCK  # layers, key and value, heads, dim, bytes
LEFT = {"load": False, "store": False}
OBJECTS, CONNECTED = "vllm:kv_offload_holdfast_objects", "vllm:kv_offload_holdfast_connected"
PIN = {"action_id": "a", "action_type": "pin", "action_version": "1", "payload": {"ttl_seconds": 600}}


def prompt(seed: int, chunks: int = CHUNKS) -> list[int]:
    """Tokens of that many chunks, and some more."""
    return np.random.default_rng(seed).integers(0, MODEL.vocabulary_size, chunks * BLOCK + 7).tolist()


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exact")
    write_checkpoint(directory, MODEL)
    return directory


def engine(checkpoint, daemon: DaemonProcess, *, tier: str = "HoldfastTier", block: int = BLOCK) -> Engine:
    module = "holdfast.engine_adapter.vllm.tier" if tier == "HoldfastTier" else "cpu_offload"
    secondary = {"type": tier, "module_path": module, "socket": str(daemon.socket), "write_policy": "write-through"}
    offloading = {
        "spec_name": "CpuTieringSpec",
        "spec_module_path": "cpu_offload",
        "cpu_bytes_to_use": 16 << 20,
        "secondary_tiers": [secondary],
    }
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": offloading}
    return Engine(
        checkpoint,
        options={"block_size": block, "dtype": "float32", "max_model_len": 1024, "kv_transfer_config": transfer},
    )


def ask(running: Engine, tokens: list[int], params: dict | None = None) -> tuple[list[int], int]:
    """Greedy tokens, and how many of the prompt's were loaded: vLLM's own memories are emptied before."""
    assert running.forget("and its offloading's first tier")
    (answer,) = running.ask([Prompt(tokens, params, count=16)])
    assert answer.finish == "length"
    return answer.tokens, answer.cached


def count(running: Engine, event: str) -> float:
    """Chunks that this happened to. vLLM looks at the tier, and at its numbers, while it works on a request."""
    running.ask([Prompt(prompt(9, 0), LEFT, count=2)])
    return running.metrics().get(f"{OBJECTS}:{event}", 0)


@pytest.mark.timeout(900)
def test_chunks_outlive_engines_and_a_daemons_death_costs_only_time(exact):
    one, two, three = prompt(1), prompt(2), prompt(3)
    loaded = CHUNKS * BLOCK
    with DaemonProcess(ddr__capacity_bytes="32 MiB", ddr__slab_bytes="1 MiB", nvme__capacity_bytes="64 MiB") as daemon:
        daemon.start()
        with engine(exact, daemon) as first:
            wanted = {number: ask(first, prompt(number), LEFT)[0] for number in (1, 2, 3)}
            assert wanted[1] != wanted[2]
            assert count(first, "stored") == 0  # as the requests said

            assert ask(first, one) == (wanted[1], 0)
            assert ask(first, two) == (wanted[2], 0)
            until(lambda: count(first, "stored") >= 2 * CHUNKS, "both are stored", 60)
            assert ask(first, one) == (wanted[1], loaded)
            assert count(first, "loaded") == CHUNKS
            assert ask(first, one, {"load": False}) == (wanted[1], 0)

            assert first.forget("and its offloading's first tier")
            assert first.hinted(one, [PIN]).cached == loaded
            until(lambda: count(first, "pinned") == CHUNKS, "what it found is pinned")

            # The daemon dies: the engine computes, and finds it again when it is back.
            daemon.kill()
            assert ask(first, one) == (wanted[1], 0)
            assert ask(first, three) == (wanted[3], 0)
            until(lambda: count(first, "dropped") >= CHUNKS, "what could not be stored is counted", 60)
            assert first.metrics()[CONNECTED] == 0
            daemon.start()
            until(lambda: count(first, "dropped") and first.metrics()[CONNECTED], "it is back", 60)
            assert ask(first, one) == (wanted[1], loaded)

        # A fresh engine finds what the first one stored, also when memory has lost it.
        daemon.stop()
        daemon.cool()
        daemon.start()
        with engine(exact, daemon) as second:
            assert ask(second, one) == (wanted[1], loaded)
            assert ask(second, two) == (wanted[2], loaded)
            assert ask(second, three) == (wanted[3], 0)  # it was never stored
            assert count(second, "loaded") == 2 * CHUNKS
            read_bytes = second.metrics()["vllm:kv_offload_tiering_read_bytes:1:HoldfastTier"]
            assert read_bytes == 2 * CHUNKS * CHUNK_BYTES

        # The control: what is loaded is what is attended. Other chunks in its rows give other tokens.
        with engine(exact, daemon, tier="ScrambledTier") as scrambled:
            tokens, cached = ask(scrambled, one)
            assert cached == loaded
            assert tokens != wanted[1]

        # Another block size: nothing is found, nothing is wrong, and the log says why.
        with engine(exact, daemon, block=2 * BLOCK) as wider:
            assert ask(wider, one) == (wanted[1], 0)
            assert count(wider, "hit") == count(wider, "loaded") == 0
            assert "has another form" in wider.log()
            assert f"tokens per hash: {BLOCK} -> {2 * BLOCK}" in wider.log()
