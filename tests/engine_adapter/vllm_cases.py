"""What tests of the connector's sides share: requests as vLLM's scheduler has them, and a small engine's spec."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from holdfast.engine_adapter.pages import FORMATS, native
from holdfast.engine_adapter.vllm.lookups import Found, Question
from holdfast.engine_adapter.vllm.plans import Ready
from holdfast.kvstore.spec import KVSpec, LayerGroup, sized

PAGE = 32
GROUP = LayerGroup(layers=(0, 1, 2), kv_heads=2, key_dim=32, value_dim=32)
CANONICAL = sized(KVSpec(groups=(GROUP,), dtype="bfloat16", model="m", vocabulary_size=9999, extent_blocks=1))
SPEC = native(CANONICAL, FORMATS["vllm-cpu-vec/1"](PAGE, 2, 32, 32))
READY = Ready(spec=SPEC, canonical=True)


@dataclass(eq=False)
class FakeRequest:
    """The attributes that we look at."""

    request_id: str
    all_token_ids: list[int]
    kv_transfer_params: dict | None = None
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_preemptions: int = 0
    skip_reading_prefix_cache: bool = False
    extras: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self):
        self.num_prompt_tokens = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def request(name="r", count=10 * PAGE + 5, **given):
    tokens = np.random.default_rng(0).integers(0, 9999, count).tolist()
    return FakeRequest(name, tokens, **given)


class FakeLookups:
    """Questions wait until the test answers them."""

    def __init__(self, ranks=()):
        self.questions: list[Question] = []
        self.closed = self.cleared = False

    def ask(self, tokens, extras):
        question = Question(tokens, extras, 1000.0)
        self.questions.append(question)
        return question

    def answer(self, count, **given):
        self.questions[-1].answer(Found(token_count=count, tier_tokens={"ddr": count}, **given))

    def clear(self):
        self.cleared = True

    def close(self):
        self.closed = True


def blocks(count, first=1):
    return (list(range(first, first + count)),)
