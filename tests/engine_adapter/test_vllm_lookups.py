"""Lookups of the vLLM connector beside its scheduler."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from holdfast.engine_adapter.vllm.lookups import Lookups
from holdfast.kvstore.views import PrefixView
from vllm_cases import PAGE, SPEC, Ready

from daemon_process import until


class Link:
    """One whose store answers the first question with a bug of ours, and then that all is cached."""

    is_up = True

    def __init__(self):
        self.bugs = [ZeroDivisionError()]

    @contextmanager
    def use(self):
        yield SimpleNamespace(lookup=self.lookup)

    def lookup(self, spec, tokens, extras=None):
        if self.bugs:
            raise self.bugs.pop()
        return PrefixView(token_count=len(tokens), tier_tokens={"ddr": len(tokens)}, document="d")

    def close(self):
        pass


def test_a_bug_costs_one_lookup_and_not_all_that_follow():
    lookups = Lookups(Link(), [Ready(spec=SPEC)], 20.0)
    try:
        asked = [lookups.ask(np.arange(2 * PAGE, dtype=np.uint32), {}) for _ in range(2)]
        until(lambda: all(question.found is not None for question in asked), "both are answered")
        assert [question.failed for question in asked] == [True, False]
        assert asked[1].found.token_count == 2 * PAGE
    finally:
        lookups.close()
