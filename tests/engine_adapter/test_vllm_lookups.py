"""Lookups of the vLLM connector beside its scheduler."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from holdfast.engine_adapter.vllm.lookups import Lookups
from holdfast.kvstore.errors import DaemonUnavailable
from holdfast.kvstore.views import PrefixView
from vllm_cases import PAGE, SPEC, Ready

from daemon_process import until


class Link:
    """One whose store answers the first question with a bug of ours, and then that all is cached."""

    is_up = True

    def __init__(self, *errors):
        self.bugs = [ZeroDivisionError()]
        self.errors = list(errors)
        self.cleared = []

    @contextmanager
    def use(self):
        if self.errors:
            raise self.errors.pop()
        yield SimpleNamespace(lookup=self.lookup, clear=self.cleared.append)

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


def test_a_reset_without_a_daemon_is_made_up_for_before_anything_is_read():
    link = Link(*[DaemonUnavailable("gone")] * 2)
    link.bugs.clear()
    lookups = Lookups(link, [Ready(spec=SPEC)], 20.0)
    try:
        lookups.clear()
        asked = [lookups.ask(np.arange(2 * PAGE, dtype=np.uint32), {}) for _ in range(3)]
        until(lambda: all(question.found is not None for question in asked), "all are answered")
        assert [question.failed for question in asked] == [True, False, False]
        assert link.cleared == [SPEC]
    finally:
        lookups.close()
