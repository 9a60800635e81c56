"""A real `lmcache server` with Holdfast behind it, and real vLLM in front of it: what one stored the next one finds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.lmcache.naming import salt_prefix
from holdfast.ring_attention.synthetic import write_checkpoint

from daemon_process import DaemonProcess, until

CHUNK = 256
ENGINE = Path(__file__).with_name("vllm_process.py")
START_SECONDS = 120.0
ENVIRONMENT = os.environ | {
    "LMCACHE_TRACK_USAGE": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Server:
    """`lmcache server` without CUDA, with our adapter as its L2."""

    def __init__(self, python, daemon, directory):
        self.port, self._http = free_port(), free_port()
        self._log = directory / f"server-{self.port}.log"
        adapter = {
            "type": "plugin",
            "module_path": "holdfast.engine_adapter.lmcache.l2_adapter",
            "class_name": "HoldfastL2Adapter",
            "adapter_params": {"socket": str(daemon.socket), "write_policy": "write-through"},
        }
        options = ["--supported-transfer-mode", "auto", "--l1-size-gb", "0.25", "--no-l1-use-lazy"]
        options += ["--eviction-policy", "LRU", "--port", str(self.port), "--http-port", str(self._http)]
        command = [python.with_name("lmcache"), "server", *options, "--l2-adapter", json.dumps(adapter)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=directory)

    def wait(self):
        until(lambda: self._process.poll() is not None or self._status(), "the server starts", START_SECONDS)
        assert self._process.poll() is None, self._log.read_text()
        return self

    def _status(self):
        with suppress(OSError):
            return self.ask("/status")
        return None

    def ask(self, path, method="GET"):
        with urlopen(Request(f"http://localhost:{self._http}{path}", method=method), timeout=20) as answer:
            return json.loads(answer.read())

    def adapter(self):
        """Our part of its status."""
        (found,) = self.ask("/status")["storage_manager"]["l2_adapters"]
        return found

    def forget(self):
        """What it has in memory is gone."""
        self.ask("/cache/clear", "POST")

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(60) in (0, -signal.SIGTERM), self._log.read_text()

    def close(self):
        self._process.kill()
        self._process.wait()


class Engine:
    """vLLM in a process of its own."""

    def __init__(self, python, model, port, directory):
        self._log = directory / f"engine-{port}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, ENGINE, model, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=ENVIRONMENT,
                cwd=directory,
            )

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, self._log.read_text()
        return json.loads(line)

    def wait(self):
        assert self._answer() == "ready"
        return self

    def ask(self, prompt):
        """The tokens that follow, and how many of the prompt's were not computed."""
        self._process.stdin.write(json.dumps(prompt) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["tokens"], answer["cached"]

    def stop(self):
        self._process.stdin.close()
        assert self._process.wait(60) == 0, self._log.read_text()

    def close(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def daemon():
    sizes = {"ddr__capacity_bytes": "32 MiB", "ddr__slab_bytes": "2 MiB"}
    sizes |= {"nvme__capacity_bytes": "64 MiB", "nvme__segment_bytes": "16 MiB"}
    with DaemonProcess(**sizes) as made:
        yield made.start()


@pytest.fixture
def start(daemon, vllm_python, lmcache_python, tmp_path):
    """Start a server and an engine of it."""
    model = tmp_path / "model"
    write_checkpoint(model)
    started = []

    def start():
        server = Server(lmcache_python, daemon, tmp_path)
        started.append(server)
        engine = Engine(vllm_python, model, server.port, tmp_path)
        started.append(engine)
        return server.wait(), engine.wait()

    yield start
    for one in reversed(started):
        one.close()


@pytest.mark.timeout(400)
def test_what_one_engine_stored_the_next_one_finds_through_holdfast(daemon, start):
    rng = np.random.default_rng(3)
    prompt = rng.integers(1, 256, 5 * CHUNK + 220).tolist()
    other = prompt[: 2 * CHUNK] + rng.integers(1, 256, 3 * CHUNK).tolist()

    server, engine = start()
    expected, cached = engine.ask(prompt)
    assert cached == 0
    different, cached = engine.ask(other)
    assert different != expected, "equal tokens would prove nothing"
    assert cached in (0, 2 * CHUNK)  # its own store may not be done yet
    until(lambda: server.adapter()["objects"].get("stored") == 8, "all chunks are in Holdfast")
    engine.stop()
    server.stop()

    # Another server has nothing in memory, another engine neither.
    server, engine = start()
    assert engine.ask(prompt) == (expected, 5 * CHUNK)
    assert engine.ask(prompt[: 3 * CHUNK] + other[3 * CHUNK :])[1] == 3 * CHUNK
    assert server.adapter()["objects"]["loaded"] >= 5

    # An operator sees what is there, and pins it.
    listed = server.ask("/cache/objects?tier=l2")["entries"]
    assert len(listed) >= 8
    store = Store(daemon.client())
    (namespace,) = {view.namespace for view in store.namespaces()}
    assert store.objects(namespace).pin(key_prefix=salt_prefix(""), owner="operator") == len(listed)
    assert store.objects(namespace).stats().pinned == len(listed)

    # Holdfast dies: the engine computes. It comes back: what it had is there.
    daemon.kill()
    server.forget()
    assert engine.ask(prompt) == (expected, 0)
    daemon.start()
    until(lambda: server.adapter()["connected"], "the server is connected again")
    server.forget()
    assert engine.ask(prompt) == (expected, 5 * CHUNK)

    # The same, with nothing left in memory: from NVMe.
    daemon.stop()
    daemon.cool()
    daemon.start()
    until(lambda: server.adapter()["connected"], "the server is connected again")
    server.forget()
    assert engine.ask(prompt) == (expected, 5 * CHUNK)
    engine.stop()
    server.stop()
