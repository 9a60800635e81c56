"""A vLLM whose every layer slides a window: it has blocks for the end of what it was promised only."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import vllm  # noqa: F401 - without it these tests are skipped
from holdfast.engine_adapter.api import connect
from holdfast.engine_adapter.checkpoint_identity import checkpoint_spec
from holdfast.ring_attention.synthetic import DEMO, write_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_engine import Engine, Prompt

from daemon_process import until

pytestmark = pytest.mark.timeout(600)
WINDOW, PAGE, NEW = 256, 32, 24
BEHIND = 2 * PAGE + 7  # tokens in the last extent: fewer than the window


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", replace(DEMO, architecture="MistralForCausalLM", window=WINDOW))
    return tmp_path / "model"


def store_all(daemon, spec, model, ids):
    """As the built-in runner does: layers with a window keep all their KV. Caches of a config would not."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with connect(daemon.socket) as store:
        with store.ingest("report", spec, ids[0].numpy().astype(np.uint32)) as writer:
            for index, layer in enumerate(cache.layers):
                writer.write(index, 0, layer.keys[0].numpy(), layer.values[0].numpy())
        store.pin("report", "nvme", owner="test")
    until(lambda: daemon.rest().get("/v1/status")["writes_queued"] == 0, "all is written")


def damage_last_extent(daemon):
    """And start again, so that it has to be read."""
    daemon.kill()
    daemon.cool()
    with closing(sqlite3.connect(daemon.data_dir / "catalog.sqlite")) as database:
        found = database.execute("SELECT segment, segment_offset FROM extents ORDER BY start DESC LIMIT 1").fetchone()
    with (daemon.data_dir / "nvme" / f"segment-{found[0]}").open("r+b") as file:
        file.seek(found[1] + 8192)
        file.write(b"\xff" * 4096)
    daemon.start()


def test_of_less_than_was_promised_nothing_is_used(directory, daemon):
    """What lies in the last tokens' window was never loaded: they would be computed from null blocks."""
    spec, model = checkpoint_spec(directory, "float32"), AutoModelForCausalLM.from_pretrained(directory)
    count = 2 * spec.block_tokens * spec.extent_blocks + BEHIND
    ids = torch.randint(0, DEMO.vocabulary_size, (1, count), generator=torch.Generator().manual_seed(5))
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, count:].tolist()
    store_all(daemon, spec, model, ids)
    with Engine(directory, daemon.socket, extra={"store": False}) as engine:

        def ask():
            assert engine.forget()
            (found,) = engine.ask([Prompt(ids[0], params={"load": True}, count=NEW)])
            assert found.tokens == expected
            return found

        assert ask().cached == count // PAGE * PAGE
        damage_last_extent(daemon)
        # The first load may fail because it is not connected again yet, while lookups are.
        until(lambda: "sealed as" in str(ask().holdfast.get("problems")), "a load came upon the damage", 60)
        assert engine.metrics()["vllm:holdfast_load_failures"] >= 1
        assert ask().cached == count - BEHIND
