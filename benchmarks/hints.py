"""What hints save: two users ask in turn over documents that neither HBM nor DDR can hold, with hints and without.

A runner over a fake engine whose decode takes a set time and no core, as on an accelerator, and a real daemon: HBM
holds two of six documents, DDR four. The time that counts is what a query waits for KV: for room, and exposed. Rounds
with and without hints alternate; every answer must be that of the first round, so no byte came from elsewhere.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.foretelling import Foreteller
from holdfast.engine_adapter.runner_service import Parts, RunnerService
from holdfast.engine_adapter.runner_wire import Answered, AskRequest, IngestRequest, RunnerFacts
from holdfast.engine_adapter.texts import Texts
from holdfast.kvstore.client import Client
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.spec import KVSpec, LayerGroup
from holdfast.ring_attention.tokenizer import ByteTokenizer
from rows import Row, machine, percentile, report, row, show

from holdfast.demo_stage import DaemonProcess

HERE = Path(__file__).parent
TOKEN_BYTES = 16 << 10
EXTENT_BYTES = 512 * TOKEN_BYTES
GROUP = "bench"
DOCUMENTS, IN_DDR, IN_HBM = 6, 4, 2
SAMPLE_STEP = 61  # an answer depends on one token in so many
DECODES_MS = (150, 40, 10)
GOALS = {150: 0.1, 40: 0.5, 10: 1.1}  # shorter than a load: at least no longer than without
SPEC = KVSpec(
    groups=(LayerGroup(layers=tuple(range(8)), kv_heads=8, key_dim=64, value_dim=64),),
    dtype="bfloat16",
    model="bench@1",
    vocabulary_size=256,
    block_tokens=64,
    extent_blocks=8,
)


class Engine(FakeEngine):
    """Its decode takes `decode_seconds`; its answer depends on some of the tokens, wherever they lie."""

    decode_seconds = 0.0

    def _answered(self, *arguments):
        answer = super()._answered(*arguments)
        time.sleep(self.decode_seconds)
        return answer

    def _gathered(self, shard):
        sampled = range(0, shard.layout.layout().token_count, SAMPLE_STEP)
        held = {
            token: (arena, span.row + token - span.start)
            for holding, arena in zip(self._holdings(shard), self._arenas, strict=True)
            for span in holding.spans
            for token in sampled
            if span.start <= token < span.stop
        }
        return {
            key: np.concatenate([held[token][0].planes[key][:, held[token][1]] for token in sampled])
            for key in self._keys()
        }


class Bench:
    """A daemon, a runner, its documents, and who asks."""

    def __init__(self, directory: Path, token_count: int, questions: int) -> None:
        self._stack = ExitStack()
        size_bytes = token_count * TOKEN_BYTES
        slab_bytes = max(EXTENT_BYTES, size_bytes // 4)
        settings = {
            "daemon.rest_port": "0",
            "ddr.capacity_bytes": str(IN_DDR * size_bytes),
            "ddr.slab_bytes": str(slab_bytes),
            "nvme.segment_bytes": str(slab_bytes),
            "nvme.capacity_bytes": str(2 * DOCUMENTS * size_bytes),
        }
        self._daemon = DaemonProcess(directory, settings)
        client = self._daemon.start()
        self._stack.callback(self._daemon.stop)
        self._stack.callback(client.close)
        self.engine = Engine(GROUP, SPEC, cp=2, rows=IN_HBM * token_count // 2, daemon_socket=self._daemon.socket)
        self._service = self._runner(directory)
        self.names = [f"document-{number}" for number in range(DOCUMENTS)]
        self._questions = questions
        self._wanted: dict[str, list[int]] = {}
        for number, name in enumerate(self.names):
            tokens = np.random.default_rng(number).integers(0, 256, token_count).tolist()
            list(self._service.ingest(IngestRequest(name=name, content=tokens, write_policy=WritePolicy.THROUGH)))
        while not all(client.document(name).durable for name in self.names):
            time.sleep(0.01)

    def _runner(self, directory: Path) -> RunnerService:
        texts = directory / "texts"
        texts.mkdir()
        facts = RunnerFacts(
            group=GROUP, tenant="default", pid=os.getpid(), model="/bench", shape="fake",
            kv_bytes_per_token=TOKEN_BYTES, cp=2, tp=1, device="cpu", threads=0, kernel="", communicator="",
            strategy="auto",
            rows=0, hbm_bytes=0, capacity_tokens=0,
        )  # fmt: skip
        service = RunnerService(
            Parts(
                facts=facts,
                start=lambda: self.engine,
                connect=lambda resume: Client(self._daemon.socket, "default", resume=resume),
                tokenizer=ByteTokenizer(),
                texts=Texts(texts, "default", SPEC.fingerprint()),
                clock=SystemClock(),
                say=print,
            )
        )
        worker = threading.Thread(target=service.serve)
        worker.start()
        self._stack.callback(service.close)
        self._stack.callback(worker.join)
        self._stack.callback(service.stop)
        return service

    def round(self) -> tuple[list[float], float]:
        """What each query waited for its KV, and how long all of them took; seconds."""
        todo = iter([self.names[number % DOCUMENTS] for number in range(self._questions)])
        lock, waits, failures = threading.Lock(), [], []

        def user() -> None:
            try:
                while (name := self._next(todo, lock)) is not None:
                    waits.append(self._ask(name))
            except Exception as error:  # noqa: BLE001 - raised again below, on the thread that measures
                failures.append(error)

        began = time.perf_counter()
        users = [threading.Thread(target=user) for _ in range(2)]
        for thread in users:
            thread.start()
        for thread in users:
            thread.join()
        if failures:
            raise failures[0]
        return waits[1:], time.perf_counter() - began  # before the first nothing runs

    @staticmethod
    def _next(todo, lock) -> str | None:
        with lock:
            return next(todo, None)

    def _ask(self, name: str) -> float:
        *_, last = self._service.ask(AskRequest(document=name, question="why?", new_tokens=4))
        assert isinstance(last, Answered), last
        assert last.swap is not None, last.reason
        assert self._wanted.setdefault(name, last.tokens) == last.tokens, "another answer than the first time"
        return (last.swap.wait_ns + last.exposed_ns) / 1e9

    def close(self) -> None:
        self._stack.close()


def silent(self: Foreteller, look: object) -> None:
    """Tells nothing."""


def run(bench: Bench, decode_ms: int, rounds: int) -> list[Row]:
    """Rounds with and without hints in turn."""
    bench.engine.decode_seconds = decode_ms / 1e3
    tells = {"with": Foreteller.tell, "without": silent}
    waits: dict[str, list[list[float]]] = {side: [] for side in tells}
    took: dict[str, list[float]] = {side: [] for side in tells}
    try:
        for number in range(rounds + 1):
            for side in sorted(tells, reverse=bool(number % 2)):
                Foreteller.tell = tells[side]
                found, seconds = bench.round()
                if number:  # the first is not counted
                    waits[side].append(found)
                    took[side].append(seconds)
            print(f"decode of {decode_ms} ms: round {number} of {rounds}", flush=True)
    finally:
        Foreteller.tell = tells["with"]
    return rows_of(decode_ms, waits, took)


def rows_of(decode_ms: int, waits: dict[str, list[list[float]]], took: dict[str, list[float]]) -> list[Row]:
    """How much of a query's wait for KV is left with hints (medians of rounds' medians), and of a whole round."""
    middles = {side: [statistics.median(one) for one in found] for side, found in waits.items()}
    tails = {side: statistics.median([percentile(one, 90) for one in found]) for side, found in waits.items()}
    raw = {
        "ours_ms": 1e3 * statistics.median(middles["with"]),
        "bare_ms": 1e3 * statistics.median(middles["without"]),
        "ours_p90_ms": 1e3 * tails["with"],
        "bare_p90_ms": 1e3 * tails["without"],
        "rounds": float(len(took["with"])),
    }
    whole = {side: statistics.median(times) for side, times in took.items()}
    both = {"ours_ms": 1e3 * whole["with"], "bare_ms": 1e3 * whole["without"], "rounds": raw["rounds"]}
    name = f"decode_{decode_ms}ms"
    return [
        row(f"hints_wait_{name}", raw["ours_ms"] / raw["bare_ms"], GOALS[decode_ms], "lower", raw),
        row(f"hints_round_{name}", both["ours_ms"] / both["bare_ms"], 1.0, "lower", both),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What queries wait for KV, with hints and without.")
    parser.add_argument("--tokens", type=int, default=4096, help="of each document; 16 KiB each")
    parser.add_argument("--questions", type=int, default=18, help="in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "hints.json")
    options = parser.parse_args(arguments)
    here = machine()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as scratch:
        bench = Bench(Path(scratch), options.tokens, options.questions)
        try:
            for decode_ms in DECODES_MS:
                rows += run(bench, decode_ms, options.rounds)
        finally:
            bench.close()
    here |= {"load_after": round(os.getloadavg()[0], 2)}
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    result = report(rows, commit, dt.datetime.now(dt.UTC).date().isoformat(), here)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(rows, f"Queries over {DOCUMENTS} documents of {options.tokens} tokens: with hints (ours) and without (bare)")


if __name__ == "__main__":
    main()
