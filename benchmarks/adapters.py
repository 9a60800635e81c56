"""Time to first token of a long prompt that was seen before, in vLLM on a CPU, by where its KV comes from.

The model is synthetic: Llama-3-8B's KV (32 layers, 8 kv heads of 128, bfloat16: 128 KiB a token) and little else, so
that a prefill takes seconds here. A prompt of 4,097 tokens has 512 MiB of KV in whole pages of 128 tokens, and one
token that every hit must compute. In each round, in turns, one engine each:

    vLLM        recompute; then a hit in its own prefix cache, which is what every other hit is measured from
    LMCache     from `lmcache server`'s RAM (shared memory); from its files, with the page cache dropped
    Holdfast    from DDR; from NVMe, after the daemon was started anew with nothing in DDR

Before every hit the engine forgets its prefixes and its pages are zeroed; counters of vLLM, of LMCache, and Holdfast's
receipts must say that the KV came from the named place, and answers must be equal. What is written to NVMe by Holdfast
is synced and checksummed, LMCache's files are neither. What each path must move, and what that takes at this
machine's limits, stands in LOG.md.

    make bench-adapters            the whole run; wants the environments of `make engines`
    adapters.py --tokens 1024      a small one: shows that every row can be measured, not what it is
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
from adapters_processes import LMCACHE, VLLM, Daemon, LMCacheServer, engine
from adapters_rows import Hits, Misses, show_hits
from adapters_sides import Holdfast, LMCache, Plain, Prompt, Side
from holdfast.ring_attention.config import ModelConfig, RopeConfig
from holdfast.ring_attention.synthetic import write_checkpoint
from plot import picture
from rows import machine, report, show

HERE: Final = Path(__file__).resolve().parent
MODEL: Final = ModelConfig(
    vocabulary_size=4096,
    hidden_size=256,
    intermediate_size=256,
    layers=32,
    heads=8,
    kv_heads=8,
    head_dim=128,
    rope=RopeConfig(theta=500_000.0),
    dtype="bfloat16",
)
TOKEN_BYTES: Final = 2 * 2 * MODEL.layers * MODEL.kv_heads * MODEL.head_dim
PROMPTS: Final = 2
UNIT_TOKENS: Final = 256  # whole pages of vLLM and whole chunks of LMCache
SIDES: Final = ("vLLM", "LMCache", "Holdfast")


class Bench:
    """The engines of the chosen sides, and prompts."""

    def __init__(self, directory: Path, stack: ExitStack, tokens: int, names: list[str]) -> None:
        """`stack` ends what was started."""
        self._stack, self._directory = stack, directory
        self._rng = np.random.default_rng(0)
        self.tokens = tokens
        self.size_bytes = tokens * TOKEN_BYTES
        model = directory / "model"
        model.mkdir()
        write_checkpoint(model, MODEL)
        # One prompt and a little fits into the engine: what was asked before is not kept beside it.
        self._settings = {
            "model": str(model),
            "max_tokens": tokens + UNIT_TOKENS,
            "step_tokens": tokens,  # a prompt's last token is computed alone, as in a hit: the same numbers
            "cache_bytes": self.size_bytes * 5 // 4 + UNIT_TOKENS * TOKEN_BYTES,
        }
        makers = {"vLLM": self._plain, "LMCache": self._lmcache, "Holdfast": self._holdfast}
        self.sides = {name: makers[name]() for name in names}

    def _plain(self) -> Side:
        return Plain(self._stack.enter_context(engine(self._directory, "vllm", self._settings, None)))

    def _lmcache(self) -> Side:
        server = LMCacheServer(self._directory, (PROMPTS + 1) * self.size_bytes)
        self._stack.callback(server.close)
        made = engine(self._directory, "vllm-lmcache", self._settings, server.connector())
        return LMCache(self._stack.enter_context(made), server)

    def _holdfast(self) -> Side:
        daemon = Daemon(self._directory, (PROMPTS + 1) * self.size_bytes, 8 * self.size_bytes)
        self._stack.callback(daemon.close)
        made = engine(self._directory, "vllm-holdfast", self._settings, daemon.connector())
        return Holdfast(self._stack.enter_context(made), daemon, self.prompt("probe", UNIT_TOKENS))

    def prompt(self, name: str, tokens: int) -> Prompt:
        """One that nobody has seen; its last token is computed by every hit."""
        return Prompt(name, self._rng.integers(0, MODEL.vocabulary_size, tokens + 1).tolist(), tokens)

    def hits(self, rounds: int) -> Hits:
        found = Hits(self.size_bytes, self._directory)
        prompts = [self.prompt(f"prompt-{number}", self.tokens) for number in range(PROMPTS)]
        for prompt in prompts:
            for side in self.sides.values():
                side.prepare(prompt)
        sides = list(self.sides.values())
        for number in range(rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                found.roof()
                for place, answer in side.visit(prompts[number % PROMPTS]):
                    found.add(place, answer)
        return found

    def misses(self, count: int) -> Misses:
        """Prompts that nobody has seen, asked of all sides in turns; of Holdfast also with nothing to be stored."""
        found = Misses(self.size_bytes)
        peers = [(name, side, None) for name, side in self.sides.items() if name != "Holdfast"]
        ours: list[tuple[str, Side, dict[str, Any] | None]] = []
        if "Holdfast" in self.sides:
            side = self.sides["Holdfast"]
            ours = [("Holdfast, no store", side, {"store": False}), ("Holdfast", side, None)]
        for number in range(count):
            prompt = self.prompt(f"miss-{number}", self.tokens)
            for name, side, params in [*ours, *peers] if number % 2 else [*peers, *ours]:
                side.reset()
                found.add(name, side.miss_cpu_seconds(prompt, params))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token of a long prompt, by where its KV comes from.")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt: a multiple of 256 (128 KiB each)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--misses", type=int, default=7, help="prompts that nobody has seen")
    parser.add_argument("--only", choices=SIDES[1:], help="vLLM and this one: less memory, fewer rows")
    parser.add_argument("--dir", type=Path, help="where checkpoints and daemons lie (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "adapters.json")
    options = parser.parse_args()
    names = [name for name in SIDES if options.only in (None, name) or name == "vLLM"]
    missing = [path for path in (VLLM, LMCACHE) if not path.exists()]
    if missing:
        parser.error(f"{missing[0]} is not there: run `make engines`")
    if options.tokens % UNIT_TOKENS:
        parser.error(f"--tokens is a multiple of {UNIT_TOKENS}")
    here = machine()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.dir) as scratch, ExitStack() as stack:
        bench = Bench(Path(scratch), stack, options.tokens, names)
        hits = bench.hits(options.rounds)
        misses = bench.misses(options.misses)
    here |= {"load_after": round(os.getloadavg()[0], 2)}
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    rows = [*hits.rows(), *misses.rows()]
    result = report(rows, commit, dt.datetime.now(dt.UTC).date().isoformat(), here)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"KV behind vLLM on a CPU, {here['cpu']}, {result['date']}, {commit}"
    options.out.with_suffix(".svg").write_text(picture(rows, title), encoding="utf-8")
    show_hits(hits)
    show(rows, f"Adapters, {bench.size_bytes >> 20} MiB of KV, {options.rounds} rounds")


if __name__ == "__main__":
    main()
