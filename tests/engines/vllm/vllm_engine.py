"""A real vLLM in a process of its own, for tests and for trying things:

    with Engine(checkpoint, daemon.socket) as engine:
        (answer,) = engine.ask([Prompt(tokens)])
        answer.tokens, answer.cached, answer.params

Without a socket it has no connector. Run with vLLM's interpreter; the child is this file,
told what to do in JSON lines.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from http.client import HTTPResponse
    from typing import Self

START_SECONDS = 300.0
ANSWER_SECONDS = 120.0
CONNECTOR = {
    "kv_connector": "HoldfastConnector",
    "kv_connector_module_path": "holdfast.engine_adapter.vllm.connector",
    "kv_role": "kv_both",
}
OWN_LABELS = ("engine", "model_name")
SERVER = "vllm.entrypoints.openai.api_server"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Prompt:
    """`params` are kv_transfer_params; `salt` is vLLM's cache_salt."""

    tokens: Sequence[int]
    params: Mapping | None = None
    salt: str | None = None
    count: int = 8


@dataclass
class Answer:
    """Greedy tokens, how many prompt tokens were cached anywhere, and the kv_transfer_params that came back."""

    tokens: list[int]
    cached: int
    params: dict | None
    finish: str

    @property
    def holdfast(self) -> dict:
        assert self.params is not None
        return self.params["holdfast"]


@dataclass
class Engine:
    """`extra` are keys behind `holdfast.`, `options` arguments of vllm.LLM.

    It computes with one thread: with another number of them tokens that are almost as good as each other may change.
    """

    checkpoint: Path
    socket: Path | None = None
    extra: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    core: int = 0

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start, without waiting until it answers."""
        options = {
            "model": str(self.checkpoint),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 4096,
            "block_size": 32,
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
            **self.options,
        }
        if self.socket is not None:
            extra = {f"holdfast.{key}": value for key, value in {"socket": str(self.socket), **self.extra}.items()}
            options["kv_transfer_config"] = {
                **CONNECTOR,
                "kv_connector_extra_config": extra,
                **options.get("kv_transfer_config", {}),
            }
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log")  # noqa: SIM115 - closed in close
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **ENVIRONMENT, **bound(self.core), "PYTHONPATH": _path()},
            start_new_session=True,
        )
        return self

    def wait_ready(self) -> None:
        """Wait until it answers. Fails with its log when it ends instead."""
        assert self._read(START_SECONDS) == "ready"

    def ask(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Ask these at once; their answers, in order."""
        self.begin(prompts)
        return self.end()

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Ask, without waiting for the answers: see `end`."""
        self._send("ask", [{**asdict(prompt), "tokens": list(map(int, prompt.tokens))} for prompt in prompts])

    def end(self, seconds: float = ANSWER_SECONDS) -> list[Answer]:
        """The answers to what was begun."""
        return [Answer(**found) for found in self._read(seconds)]

    def hinted(self, tokens: Sequence[int], actions: Sequence[Mapping], count: int = 8) -> Answer:
        """Ask one prompt with these actions of kv_hints, which vllm.LLM has no argument for."""
        self._send("hinted", {"tokens": list(map(int, tokens)), "actions": list(actions), "count": count})
        return Answer(**self._read(ANSWER_SECONDS))

    def forget(self, connector: str = "") -> bool:
        """Empty vLLM's own prefix cache, so that only the store can have a prompt; `connector`: that too."""
        self._send("forget", connector)
        return self._read(ANSWER_SECONDS)

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of vLLM's metrics by name, those with labels as name:label."""
        self._send("metrics", None)
        return self._read(ANSWER_SECONDS)

    def log(self) -> str:
        """What it has logged so far."""
        return Path(self._log.name).read_text()

    def close(self) -> None:
        """End it, and everything that it started. Again is nothing."""
        if self._log.closed:
            return
        try:
            with suppress(subprocess.TimeoutExpired, OSError):
                self._process.stdin.close()
                self._process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdout.close()
            self._log.close()

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, verb: str, what: object) -> None:
        self._process.stdin.write(json.dumps([verb, what]) + "\n")
        self._process.stdin.flush()

    def _read(self, seconds: float) -> object:
        timer = threading.Timer(seconds, os.killpg, (self._process.pid, signal.SIGKILL))
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        assert line, f"the engine ended, or did not answer within {seconds:g} s:\n{self.log()[-6000:]}"
        return json.loads(line)


@dataclass
class Server:
    """The same behind vLLM's OpenAI server; `options` are flags. It serves the model "m" without a tokenizer."""

    checkpoint: Path
    socket: Path
    extra: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    core: int = 0

    def start(self) -> Self:
        """Start, without waiting until it answers."""
        with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as free:
            port = free.server_address[1]
        self.address = f"http://127.0.0.1:{port}"
        extra = {f"holdfast.{key}": value for key, value in {"socket": str(self.socket), **self.extra}.items()}
        flags = {
            "model": str(self.checkpoint),
            "served-model-name": "m",
            "host": "127.0.0.1",
            "port": port,
            "dtype": "float32",
            "max-model-len": 4096,
            "block-size": 32,
            "kv-transfer-config": json.dumps({**CONNECTOR, "kv_connector_extra_config": extra}),
            **self.options,
        }
        given = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
        plain = ["--skip-tokenizer-init", "--enforce-eager", "--enable-prompt-tokens-details"]
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log")  # noqa: SIM115 - closed in close
        self._process = subprocess.Popen(
            [sys.executable, "-m", SERVER, *plain, *given],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **ENVIRONMENT,
                **bound(self.core),
                "PYTHONPATH": _path(),
                "VLLM_SERVER_DEV_MODE": "1",
            },
            start_new_session=True,
        )
        return self

    def wait_ready(self) -> None:
        """Wait until it answers. Fails with its log when it ends instead."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), urlopen(f"{self.address}/health", timeout=5):
                return
            assert self._process.poll() is None, self.log()[-6000:]
            assert time.monotonic() < deadline, self.log()[-6000:]
            time.sleep(0.1)

    def ask(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Ask these at once; their answers, in order."""
        self.begin(prompts)
        return self.end()

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Ask, without waiting for the answers: see `end`."""
        clients = ThreadPoolExecutor(len(prompts))
        self._asked = [clients.submit(self._complete, prompt) for prompt in prompts]
        clients.shutdown(wait=False)

    def end(self, seconds: float = ANSWER_SECONDS) -> list[Answer]:
        """The answers to what was begun."""
        return [asked.result(seconds) for asked in self._asked]

    def body(self, prompt: Prompt, **given: object) -> bytes:
        """The request of a completion."""
        found = {
            "model": "m",
            "prompt": list(map(int, prompt.tokens)),
            "max_tokens": prompt.count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **({"kv_transfer_params": prompt.params} if prompt.params is not None else {}),
            **({"cache_salt": prompt.salt} if prompt.salt is not None else {}),
            **given,
        }
        return json.dumps(found).encode()

    def post(self, path: str, body: bytes = b"") -> HTTPResponse:
        """Ask something of its API."""
        asked = Request(f"{self.address}{path}", body, {"content-type": "application/json"}, method="POST")
        return urlopen(asked, timeout=ANSWER_SECONDS)

    def _complete(self, prompt: Prompt) -> Answer:
        with self.post("/v1/completions", self.body(prompt)) as answer:
            found = json.load(answer)
        (choice,) = found["choices"]
        details = found["usage"]["prompt_tokens_details"] or {}
        return Answer(
            choice["token_ids"],
            details.get("cached_tokens") or 0,
            found.get("kv_transfer_params"),
            choice["finish_reason"],
        )

    def forget(self, connector: str = "") -> bool:
        """Empty vLLM's own prefix cache, so that only the store can have a prompt; `connector`: that too."""
        with self.post(f"/reset_prefix_cache?reset_external={'true' if connector else 'false'}") as answer:
            return json.load(answer)["success"]

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of its metrics page, as Engine has them."""
        with urlopen(f"{self.address}/metrics", timeout=ANSWER_SECONDS) as page:
            lines = page.read().decode().splitlines()
        found = {}
        for line in lines:
            named = re.match(r"([a-z:_]+?)(?:_total)?\{(.*)\} (\S+)$", line)
            if named:
                source = re.search(r'source="([a-z_]+)"', named[2])
                found[":".join(filter(None, [named[1], source and source[1]]))] = float(named[3])
        return found

    def log(self) -> str:
        """What it has logged so far."""
        return Path(self._log.name).read_text()

    def close(self) -> None:
        """End it, and everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def bound(core: int) -> dict[str, str]:
    """One thread, on one core."""
    return {"VLLM_CPU_OMP_THREADS_BIND": str(core % os.cpu_count())}


def _path() -> str:
    """Where vLLM's processes find modules: they import helpers beside this file by name, too."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def _answer(found) -> dict:
    return {
        "tokens": list(found.outputs[0].token_ids),
        "cached": found.num_cached_tokens or 0,
        "params": found.kv_transfer_params,
        "finish": found.outputs[0].finish_reason,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its children print where they like
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.argv[1]))

    def ask(prompts):
        texts = [
            {"prompt_token_ids": one["tokens"], **({"cache_salt": one["salt"]} if one["salt"] else {})}
            for one in prompts
        ]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=one["count"],
                ignore_eos=True,
                detokenize=False,
                extra_args=None if one["params"] is None else {"kv_transfer_params": one["params"]},
            )
            for one in prompts
        ]
        return [_answer(found) for found in llm.generate(texts, sampling, use_tqdm=False)]

    def hinted(one):
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        sampling = SamplingParams(temperature=0, max_tokens=one["count"], ignore_eos=True, detokenize=False)
        hints = KvHintsEnvelope("1", "test", [KvHintAction(**action) for action in one["actions"]])
        llm.llm_engine.add_request("hinted", {"prompt_token_ids": one["tokens"]}, sampling, kv_hints=hints)
        found = []
        while llm.llm_engine.has_unfinished_requests():
            found += llm.llm_engine.step()
        return _answer(found[-1])

    verbs = {
        "ask": ask,
        "hinted": hinted,
        "forget": lambda connector: llm.reset_prefix_cache(reset_connector=bool(connector)),
        "metrics": lambda _: {
            ":".join(
                [metric.name, *(value for key, value in metric.labels.items() if key not in OWN_LABELS)]
            ): metric.value
            for metric in llm.get_metrics()
            if hasattr(metric, "value")
        },
    }

    def tell(what: object) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    tell("ready")
    for line in sys.stdin:
        verb, what = json.loads(line)
        tell(verbs[verb](what))


if __name__ == "__main__":
    main()
