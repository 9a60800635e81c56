"""HoldfastTier below vLLM's own offloading: real engines, one after the other, and a daemon that dies between."""

from __future__ import annotations

import numpy as np
import pytest
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import write_checkpoint

from daemon_process import DaemonProcess, until
from vllm_process import EngineProcess

MODEL = ModelConfig(
    vocabulary_size=512, hidden_size=128, intermediate_size=256, layers=4, heads=4, kv_heads=2, head_dim=32,
    dtype="bfloat16",
)  # fmt: skip
BLOCK = 32
PROMPT_BLOCKS = 12
CHUNK_BYTES = 4 * 2 * 2 * 32 * 2 * BLOCK  # layers, key and value, heads, dim, bytes
OBJECTS = "vllm:kv_offload_holdfast_objects"
DAEMON = {
    "ddr__capacity_bytes": "32 MiB",
    "ddr__slab_bytes": "1 MiB",
    "nvme__capacity_bytes": "64 MiB",
    "nvme__segment_bytes": "4 MiB",
}


def prompt(seed: int, blocks: int = PROMPT_BLOCKS) -> list[int]:
    """Tokens of that many blocks, and some more."""
    return np.random.default_rng(seed).integers(0, MODEL.vocabulary_size, blocks * BLOCK + 7).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, MODEL)
    return directory


def engine(checkpoint, daemon: DaemonProcess, *, tier: str = "HoldfastTier", block: int = BLOCK) -> EngineProcess:
    module = "holdfast.engine_adapter.vllm.tier" if tier == "HoldfastTier" else "cpu_offload"
    secondary = {"type": tier, "module_path": module, "socket": str(daemon.socket), "write_policy": "write-through"}
    return EngineProcess(
        {
            "model": str(checkpoint),
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            "block_size": block,
            "disable_log_stats": False,
            "enforce_eager": True,
            "kv_transfer_config": {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "spec_name": "CpuTieringSpec",
                    "spec_module_path": "cpu_offload",
                    "cpu_bytes_to_use": 16 << 20,
                    "secondary_tiers": [secondary],
                },
            },
        },
        XDG_CACHE_HOME=str(checkpoint / "cache"),
    )


def count(running: EngineProcess, event: str) -> float:
    """Chunks that this happened to. Asking makes the engine report what it has counted."""
    return running.metrics(OBJECTS).get(f"{OBJECTS}{{event={event}}}", 0.0)


def stored(running: EngineProcess, chunks: int) -> None:
    """Wait until so many chunks were stored; short requests keep vLLM stepping, which is when it looks."""
    filler = iter(range(10_000, 20_000))
    until(
        lambda: running.generate(prompt(next(filler), 0), 2) and count(running, "stored") >= chunks, "it is stored", 60
    )


@pytest.mark.timeout(900)
def test_chunks_outlive_engines_and_a_daemons_death_costs_only_time(checkpoint):
    first, second, third = prompt(1), prompt(2), prompt(3)
    with DaemonProcess(**DAEMON) as daemon:
        daemon.start()
        with engine(checkpoint, daemon) as one:
            reference = {seed: one.generate(prompt(seed))["tokens"] for seed in (1, 2)}
            assert reference[1] != reference[2]
            stored(one, 2 * PROMPT_BLOCKS)
            assert count(one, "loaded") == 0

            # Its own memory forgets, Holdfast does not.
            assert one.ask("reset")
            again = one.generate(first)
            assert (again["tokens"], again["cached"]) == (reference[1], PROMPT_BLOCKS * BLOCK)
            assert count(one, "loaded") == PROMPT_BLOCKS

            # No store, no load, when a request says so; the pin is kept with what it found.
            kept = daemon_objects(daemon)
            assert one.ask("reset")
            assert one.generate(first, params={"load": False, "store": False}) == {**again, "cached": 0}
            assert one.ask("reset")
            hint = {"action_id": "a", "action_type": "pin", "action_version": "1", "payload": {"ttl_seconds": 600}}
            assert one.generate(first, hints=[hint])["cached"] == PROMPT_BLOCKS * BLOCK
            until(lambda: one.generate(prompt(4, 0), 1) and count(one, "pinned") == PROMPT_BLOCKS, "they are pinned")
            assert daemon_objects(daemon) == kept

            # The daemon dies, with work under way or not; the engine computes.
            daemon.kill()
            assert one.ask("reset")
            alone = one.generate(first)
            assert (alone["tokens"], alone["cached"]) == (reference[1], 0)
            third_reference = one.generate(third)["tokens"]
            assert count(one, "dropped") >= PROMPT_BLOCKS
            assert one.metrics()["vllm:kv_offload_holdfast_connected"] == 0

            daemon.start()
            until(lambda: one.generate(prompt(4, 0)) and one.metrics()["vllm:kv_offload_holdfast_connected"], "back")
            assert one.ask("reset")
            back = one.generate(first)
            assert (back["tokens"], back["cached"]) == (reference[1], PROMPT_BLOCKS * BLOCK)

        # Another engine finds what the first one stored, also where it was lost from memory.
        daemon.stop()
        daemon.cool()
        daemon.start()
        with engine(checkpoint, daemon) as two:
            for seed, tokens in ((1, first), (2, second)):
                found = two.generate(tokens)
                assert (found["tokens"], found["cached"]) == (reference[seed], PROMPT_BLOCKS * BLOCK)
            assert two.generate(third)["tokens"] == third_reference
            metrics = two.metrics()
            assert metrics["vllm:kv_offload_tiering_read_bytes{tier=1:HoldfastTier}"] == 2 * PROMPT_BLOCKS * CHUNK_BYTES
            assert count(two, "loaded") == 2 * PROMPT_BLOCKS

        # The control: what is loaded is what is attended. Other chunks in its rows give other tokens.
        with engine(checkpoint, daemon, tier="ScrambledTier") as scrambled:
            found = scrambled.generate(first)
            assert found["cached"] == PROMPT_BLOCKS * BLOCK
            assert found["tokens"] != reference[1]

        # Another block size: nothing is found, nothing is wrong, and the log says why.
        with engine(checkpoint, daemon, block=2 * BLOCK) as wider:
            assert wider.generate(first) == {"tokens": reference[1], "cached": 0, "finish": "length"}
            assert count(wider, "hit") == count(wider, "loaded") == 0
            assert "has another form" in wider.said
            assert f"tokens per hash: {BLOCK} -> {2 * BLOCK}" in wider.said


def daemon_objects(daemon: DaemonProcess) -> int:
    """Bytes in DDR: what was stored."""
    return daemon.used("ddr")
