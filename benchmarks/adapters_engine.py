"""One vLLM engine, in vLLM's environment, asked over peer.Peer: start, ask, forget, zero."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Final

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02  # asking is work, too
COUNTERS: Final = {
    "vllm:prefix_cache_hits": "own_tokens",
    "vllm:external_prefix_cache_hits": "external_tokens",
}


class Pages:
    """What the engine's worker can do beside its work (worker_extension_cls)."""

    def zero_pages(self) -> None:
        for pages in self.model_runner.kv_caches:
            pages.zero_()


class Engine:
    """Its answers are greedy, and as long as they are asked to be."""

    def __init__(
        self, *, model: str, max_tokens: int, step_tokens: int, cache_bytes: int, connector: dict[str, Any] | None
    ) -> None:
        self._llm = LLM(
            model,
            skip_tokenizer_init=True,
            max_model_len=max_tokens,
            max_num_batched_tokens=step_tokens,
            enforce_eager=True,
            enable_prefix_caching=True,
            disable_log_stats=False,
            kv_cache_memory_bytes=cache_bytes,
            kv_transfer_config=connector,
            # LMCache's connector does not work with it; one group of layers needs none.
            disable_hybrid_kv_cache_manager=True,
            worker_extension_cls=f"adapters_engine.{Pages.__name__}",
        )
        self._asked = 0

    def ask(self, *, tokens: list[int], answer_tokens: int, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """`params` is what the request says to the connector. Counters are what this question added."""
        engine, before = self._llm.llm_engine, self._count()
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=answer_tokens,
            min_tokens=answer_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
            extra_args={"kv_transfer_params": params} if params is not None else None,
        )
        self._asked += 1
        prompt = TokensPrompt(prompt_token_ids=tokens)
        started = time.perf_counter()
        engine.add_request(str(self._asked), prompt, sampling)
        first_seconds, answer = None, None
        while engine.has_unfinished_requests():
            for output in engine.step():
                first_seconds = first_seconds or time.perf_counter() - started
                answer = output
        assert answer is not None
        after = self._count()
        return {
            "first_seconds": first_seconds,
            "seconds": time.perf_counter() - started,
            "tokens": list(answer.outputs[0].token_ids),
            **{name: after[name] - before[name] for name in after},
            **(answer.kv_transfer_params or {}).get("holdfast", {}),
        }

    def _count(self) -> dict[str, int]:
        return {COUNTERS[found.name]: found.value for found in self._llm.get_metrics() if found.name in COUNTERS}

    def forget(self) -> dict[str, Any]:
        """Forget what is cached in the engine, as soon as nobody saves it any more."""
        limit = time.monotonic() + WAIT_SECONDS
        while not self._llm.reset_prefix_cache():
            assert time.monotonic() < limit, "saves do not end"
            time.sleep(POLL_SECONDS)
        return {}

    def zero(self) -> dict[str, Any]:
        """Zero the pages, whatever the engine believes to be in them."""
        self._llm.collective_rpc("zero_pages")
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no answer
    engine = None
    try:
        for line in sys.stdin:
            command = json.loads(line)
            do = command.pop("do")
            if engine is None:
                assert do == "start", do
                engine, answer = Engine(**command), {}
            else:
                answer = getattr(engine, do)(**command)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        answers.close()  # the engine's threads may keep this process; nobody waits for an answer any more


if __name__ == "__main__":
    main()
