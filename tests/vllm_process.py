"""A vLLM engine in a process of its own, which a test asks many things: one start costs ten seconds and more.

The child (this file as a script) reads commands as JSON lines and answers each with one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from queue import Empty, Queue

MARK = "ANSWER "
START_SECONDS = 240.0
ANSWER_SECONDS = 120.0
ENGINE_TESTS = Path(__file__).resolve().parent / "engines" / "vllm"


class EngineDied(Exception):
    """It ended; what it said is in the message."""


class EngineProcess:
    """`arguments` are LLM's. Use as a context manager."""

    def __init__(self, arguments: dict, **environment: str) -> None:
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "VLLM_LOGGING_LEVEL": "INFO",
            "PYTHONPATH": os.pathsep.join([str(ENGINE_TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        self._said: deque[str] = deque(maxlen=400)
        self._answers: Queue[str | None] = Queue()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **settings, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self):
        assert self._next(START_SECONDS) == "ready"
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._answers.put(line.removeprefix(MARK))
            else:
                self._said.append(line)
        self._answers.put(None)

    def _next(self, seconds: float) -> object:
        try:
            line = self._answers.get(timeout=seconds)
        except Empty:
            line = None
        if line is None:
            raise EngineDied("".join(self._said))
        return json.loads(line)

    @property
    def said(self) -> str:
        """What it logged lately."""
        return "".join(self._said)

    def ask(self, what: str, **arguments: object) -> object:
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._next(ANSWER_SECONDS)

    def generate(self, tokens: list[int], count: int = 16, params=None, hints=None) -> dict:
        """Greedy tokens that follow, and how many of the prompt's came from a cache."""
        return self.ask("generate", tokens=tokens, count=count, params=params, hints=hints)

    def metrics(self, prefix: str = "vllm:") -> dict[str, float]:
        """Counters and gauges by name and labels: "vllm:name{event=stored}"."""
        return {name: value for name, value in self.ask("metrics").items() if name.startswith(prefix)}

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(60.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(10.0)
        self._process.stdout.close()


# The child ---------------------------------------------------------------------------------------


def answer(content: object) -> None:
    print(f"\n{MARK}{json.dumps(content)}", flush=True)  # noqa: T201 - this is what the parent reads


def serve(arguments: dict) -> None:
    from vllm import LLM

    llm = LLM(**arguments)
    answer("ready")
    commands = Commands(llm)
    for line in sys.stdin:
        command = json.loads(line)
        answer(getattr(commands, command.pop("do"))(**command))


class Commands:
    """What the parent may ask."""

    def __init__(self, llm) -> None:
        self.llm = llm
        self.requests = 0

    def generate(self, tokens, count, params, hints):
        from vllm import SamplingParams
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        self.requests += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, detokenize=False)
        if params is not None:
            sampling.extra_args = {"kv_transfer_params": params}
        envelope = None
        if hints is not None:
            envelope = KvHintsEnvelope("1", "m", [KvHintAction(**hint) for hint in hints])
        engine = self.llm.llm_engine
        engine.add_request(f"r{self.requests}", {"prompt_token_ids": tokens}, sampling, kv_hints=envelope)
        last = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = output
        return {
            "tokens": list(last.outputs[0].token_ids),
            "cached": last.num_cached_tokens,
            "finish": last.outputs[0].finish_reason,
        }

    def metrics(self):
        found = {}
        for metric in self.llm.get_metrics():
            labels = ",".join(f"{k}={v}" for k, v in sorted(metric.labels.items()) if k not in ("engine", "model_name"))
            if hasattr(metric, "value"):
                found[f"{metric.name}{{{labels}}}" if labels else metric.name] = metric.value
        return found

    def reset(self):
        """Forget everything in the engine, its primary offloading tier included; not the secondary ones."""
        return self.llm.reset_prefix_cache(reset_connector=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
