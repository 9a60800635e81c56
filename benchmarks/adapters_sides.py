"""The sides of bench-adapters: an engine each, what stands behind it, and proof of where every hit came from.

A question whose KV came from elsewhere than the named place, or whose answer differs from the first one, ends the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from adapters_processes import Daemon, LMCacheServer, cpu_seconds
from documents import until
from peer import Peer

ANSWER_TOKENS: Final = 8
IDLE_POLL_SECONDS: Final = 0.1  # asking is the daemon's work, too
CHUNK_TOKENS: Final = 256  # LMCache's, by default: a multiple of vLLM's pages on a CPU


class WrongSource(Exception):
    """A hit did not come from the place that the row names, or the answer was another one."""


@dataclass
class Prompt:
    """`cached` of its tokens are whole pages and chunks, which a cache can bring; `answer` is the first engine's."""

    name: str
    tokens: list[int]
    cached: int
    answer: list[int] | None = None


@dataclass
class Answer:
    """Seconds to its first token, and to the last; what was counted, and what a connector said."""

    first_seconds: float
    seconds: float
    counts: dict[str, Any] = field(default_factory=dict)


class Side(ABC):
    """One engine, and what stands behind it: `servers` are processes whose work is this side's, too."""

    name: str

    def __init__(self, engine: Peer) -> None:
        self.engine = engine

    @property
    def servers(self) -> list[int]:
        return []

    def ask(self, prompt: Prompt, params: dict[str, Any] | None = None) -> Answer:
        """Ask, and hold the answer against the first one."""
        found = self.engine.ask("ask", tokens=prompt.tokens, answer_tokens=ANSWER_TOKENS, params=params)
        tokens = found.pop("tokens")
        prompt.answer = prompt.answer or tokens
        if tokens != prompt.answer:
            raise WrongSource(f"{self.name} answers {prompt.name} with {tokens}, not {prompt.answer} ({found})")
        return Answer(found.pop("first_seconds"), found.pop("seconds"), found)

    def expect(self, answer: Answer, **wanted: int) -> Answer:
        found = {name: answer.counts[name] for name in wanted}
        if found != wanted:
            raise WrongSource(f"{self.name}: {found} where it should be {wanted}; all counters: {answer.counts}")
        return answer

    def miss(self, prompt: Prompt, params: dict[str, Any] | None = None) -> Answer:
        """A prompt that nobody has seen."""
        return self.expect(self.ask(prompt, params), own_tokens=0, external_tokens=0)

    def miss_cpu_seconds(self, prompt: Prompt, params: dict[str, Any] | None = None) -> float:
        """CPU time of a miss, with what is done for it later; not of the engine's workers, which spin a while idly."""
        engine, servers = cpu_seconds([self.engine.pid]), cpu_seconds(self.servers)
        self.miss(prompt, params)
        self.engine.ask("forget")
        engine = cpu_seconds([self.engine.pid]) - engine
        self.settle()
        return engine + cpu_seconds(self.servers) - servers

    def reset(self) -> None:
        """No prefix in the engine, and zeros in its pages: KV of an earlier question must not pass for a hit's."""
        self.engine.ask("forget")
        self.engine.ask("zero")

    @abstractmethod
    def prepare(self, prompt: Prompt) -> None:
        """Have it where this side's hits come from."""

    @abstractmethod
    def visit(self, prompt: Prompt) -> Iterator[tuple[str, Answer]]:
        """This side's questions of one round."""

    def settle(self) -> None:
        """Wait until what a question left to do is done, and forget the prefix."""
        self.engine.ask("forget")


class Plain(Side):
    name = "vLLM"

    def prepare(self, prompt: Prompt) -> None:
        """Its own pages are all it has. And they matter: the answer is another one when they are zeros."""
        self.reset()
        self.miss(prompt)
        self.engine.ask("zero")
        try:
            self.ask(prompt)
        except WrongSource:
            return
        raise WrongSource("the answer does not depend on the pages: equal answers would prove nothing")

    def visit(self, prompt: Prompt) -> Iterator[tuple[str, Answer]]:
        self.reset()
        yield "recompute", self.miss(prompt)
        yield "own_hit", self.expect(self.ask(prompt), own_tokens=prompt.cached, external_tokens=0)


class LMCache(Side):
    name = "LMCache"

    def __init__(self, engine: Peer, server: LMCacheServer) -> None:
        super().__init__(engine)
        self._server = server

    @property
    def servers(self) -> list[int]:
        return [self._server.pid]

    def prepare(self, prompt: Prompt) -> None:
        chunks = self._server.chunks() + prompt.cached // CHUNK_TOKENS
        self.reset()
        self.miss(prompt)
        self.reset()
        until(lambda: self._server.chunks() >= chunks)

    def visit(self, prompt: Prompt) -> Iterator[tuple[str, Answer]]:
        self.reset()
        self.ask(prompt)  # from wherever it is; it stays in RAM
        self.reset()
        yield "lmcache_ram", self._hit(prompt, ram_tokens=prompt.cached, disk_tokens=0)
        self.reset()
        self._server.clear()
        yield "lmcache_disk", self._hit(prompt, ram_tokens=0, disk_tokens=prompt.cached)

    def _hit(self, prompt: Prompt, **wanted: int) -> Answer:
        before = self._server.hits()
        answer = self.ask(prompt)
        until(lambda: sum(self._server.hits().values()) - sum(before.values()) >= prompt.cached)
        answer.counts |= {name: tokens - before[name] for name, tokens in self._server.hits().items()}
        return self.expect(answer, own_tokens=0, external_tokens=prompt.cached, **wanted)


class Holdfast(Side):
    name = "Holdfast"

    def __init__(self, engine: Peer, daemon: Daemon, probe: Prompt) -> None:
        super().__init__(engine)
        self._daemon, self._probe = daemon, probe

    @property
    def servers(self) -> list[int]:
        return [self._daemon.pid]

    def prepare(self, prompt: Prompt) -> None:
        for one in (self._probe, prompt):
            self.reset()
            self.ask(one)
            self.settle()

    def visit(self, prompt: Prompt) -> Iterator[tuple[str, Answer]]:
        self.reset()
        self.ask(prompt)  # from wherever it is; it stays in DDR
        self.reset()
        yield "holdfast_ddr", self._hit(prompt, "ddr")
        self.restart()
        yield "holdfast_nvme", self._hit(prompt, "nvme")

    def restart(self) -> None:
        """Another daemon, with nothing in DDR; the engine has found it when it gets a small document from there."""
        self._daemon.restart()

        def is_back() -> bool:
            self.reset()
            found = self.ask(self._probe, {})  # vLLM counts a hit before it is loaded, and when that fails, too
            return found.counts["hit_tokens"] == self._probe.cached

        until(is_back)
        self.reset()

    def settle(self) -> None:
        super().settle()
        until(self._daemon.is_idle, IDLE_POLL_SECONDS)

    def _hit(self, prompt: Prompt, tier: str) -> Answer:
        """The daemon's own receipt says where the bytes came from."""
        answer = self.ask(prompt, {})  # which asks for an answer of the connector's
        receipt = answer.counts["receipt"] or {}
        if receipt.get("token_count") != prompt.cached or set(receipt["source_bytes"]) != {tier}:
            raise WrongSource(f"{self.name} has not brought {prompt.cached} tokens from {tier}: {answer}")
        return self.expect(answer, own_tokens=0, external_tokens=prompt.cached, hit_tokens=prompt.cached)
