"""SchedulerSide: decides what is loaded and saved for whom, from what the lookups found and the workers said.

All of it runs on the engine's scheduler thread, and nothing of it waits.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final

import numpy as np

from ...kvstore.keys import Extras
from .caches import NULL_BLOCK
from .lookups import NOTHING, Found, Lookups, Question
from .plans import Heard, Load, Loaded, Plan, Ready, Save, Saved, Tokens
from .request import Blocks, ExtrasOf, Request
from .settings import Settings
from .wishes import Wishes, wishes_of

LOG: Final = logging.getLogger("vllm.holdfast")
ANSWER_SECONDS: Final = 1.0  # a request that waits longer for blocks is looked up again
IDLE_SECONDS: Final = 0.005  # in a step that computes nothing; a request that arrives then is seen so much later
QUIET_SECONDS: Final = 10.0  # between two lines of one kind


@dataclass(slots=True, eq=False)
class _Request:
    """What we know of one request."""

    request: Request
    wishes: Wishes
    question: Question | None = None
    preemptions: int = 0  # when the question was asked
    expires: float = inf  # then it is asked again
    unanswered: bool = False  # nobody could say, and the request has waited enough
    computed: int = 0  # tokens that the engine had by itself when it was told of ours
    found: Found = NOTHING  # of the load that was ordered
    ordered: int = 0  # tokens to be there after the load; 0: none was ordered
    loading: int = 0  # ranks that have not said how the load ended
    untold: bool = False  # what its KV depends on cannot be told
    spoilt: bool = False  # a load brought less than was promised: it is not tried again
    loaded: Loaded | None = None
    saved_tokens: int = 0  # of the last save that was ordered
    saves: int = 0  # ordered, and not yet heard of
    saves_preemptions: int = 0  # of the request, when the last was ordered
    saved: Saved | None = None
    not_saved: str | None = None


class SchedulerSide:
    """The engine's scheduler asks, `plan` says what its workers are to do, `heard` is told what they did."""

    def __init__(self, settings: Settings, extras_of: ExtrasOf, *, loads: str = "", saves: str = "") -> None:
        """`extras_of(request, page_tokens, token_count)`: what its KV depends on besides tokens, by page.

        None: on what cannot be told; then nothing is loaded or saved for it.
        `loads`, `saves`: why nothing is loaded or saved in this engine; empty: it is.
        """
        self._settings = settings
        self._extras_of = extras_of
        self._no_loads, self._no_saves = loads, saves
        self._lookups: Lookups | None = None
        self._page_tokens = 1
        self._token_bytes = 0
        self._ranks = 1
        self._canonical = False  # documents may also be stored in canonical form
        self._window: int | None = None
        self._requests: dict[str, _Request] = {}
        self._awaited: Question | None = None  # in this step
        self._loads: list[Load] = []
        self._saves: list[Save] = []
        self._stops: list[str] = []
        self._held: dict[str, _Request] = {}  # ended, and the workers have not said yet that their saves are over
        self._newly_held: list[str] = []
        self._unsaid, self._quiet_until = 0, 0.0
        self.counts: defaultdict[str, float] = defaultdict(float)

    def open(self, ranks: Sequence[Ready], lookups: Callable[[Sequence[Ready]], Lookups]) -> None:
        """The workers have said what they keep: begin, unless one of them stays away."""
        reasons = sorted({rank.reason for rank in ranks if rank.spec is None})
        if reasons or not ranks:
            LOG.warning("holdfast: nothing is cached: %s", "; ".join(reasons) or "no worker has said what it keeps")
            return
        first = ranks[0].spec
        assert first is not None
        self._page_tokens = first.block_tokens
        self._token_bytes = sum(rank.spec.bytes_per_token for rank in ranks if rank.spec is not None)
        self._ranks = len(ranks)
        self._canonical = len(ranks) == 1 and ranks[0].canonical
        self._window = min((rank.window for rank in ranks if rank.window is not None), default=None)
        self._lookups = lookups(ranks)
        LOG.info("holdfast: pages of %s, %d tokens each", first.page_format, first.block_tokens)

    # What the scheduler asks -------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A request was added: its lookup can begin while it waits."""
        known = self._requests[request.request_id] = _Request(request, wishes_of(request.kv_transfer_params))
        if self._lookups is None:
            self.counts["unserved"] += 1
        if self._may_load(known):
            self._ask(known, expires=time.monotonic() + ANSWER_SECONDS)

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` can be loaded; None: not known yet. And whether beside other work."""
        known = self._requests.get(request.request_id)
        if known is None or not self._may_load(known):
            return 0, False
        question = known.question
        stale = time.monotonic() > known.expires and not known.unanswered
        if question is None or stale or known.preemptions != request.num_preemptions:
            question = self._ask(known, expires=inf)
            if question is None:
                return 0, False
        if question.found is None:
            if question.seconds < self._settings.lookup_seconds:
                self._awaited = question
                return None, False
            question.miss()
        known.expires = min(known.expires, time.monotonic() + ANSWER_SECONDS)
        if question.failed and not known.unanswered:
            known.unanswered = True
            self.counts["lookup_failures"] += 1
        found = question.found
        assert found is not None
        usable = min(found.token_count, request.num_tokens - 1) // self._page_tokens * self._page_tokens
        known.computed = computed
        if usable <= computed:
            return 0, False
        return usable - computed, True

    def allocated(self, request: Request, blocks: Blocks, external: int) -> None:
        """The engine has blocks for so many tokens that we promised."""
        known = self._requests.get(request.request_id)
        if known is None or not external:
            return
        question = known.question
        assert question is not None
        assert question.found is not None
        start, stop = known.computed, known.computed + external
        first, last = start // self._page_tokens, stop // self._page_tokens
        known.found, known.ordered, known.loading = question.found, stop, self._ranks
        self._loads.append(
            Load(
                request=request.request_id,
                tokens=question.tokens[:stop],
                extras=question.extras,
                start=start,
                stop=stop,
                blocks=tuple(table[first:last] for table in blocks),
                canonical=question.found.canonical,
            )
        )
        self.counts["loads"] += 1

    def plan(
        self, scheduled: Mapping[str, int], preempted: Collection[str], blocks_of: Callable[[str], Blocks | None]
    ) -> Plan:
        """What the workers are to do in this step."""
        for name in preempted:
            known = self._requests.get(name)
            if known is not None and known.saves:
                self._stops.append(name)
                known.saved_tokens = 0  # it will be prefilled again, and saved then
        if self._lookups is not None and not self._no_saves:
            for name, count in scheduled.items():
                known = self._requests.get(name)
                if known is None:
                    continue
                computed = known.request.num_computed_tokens + count
                if not known.saved_tokens:
                    self._save_prompt(known, computed, blocks_of)
                elif known.saves and self._is_beyond_window(computed):
                    self._stops.append(name)
        if self._awaited is not None and not scheduled:
            self._awaited.wait(IDLE_SECONDS)  # else the engine would take the cores from whoever is to answer
        self._awaited = None
        return replace(self._drawn_up(), idle=not scheduled)

    def abandon(self) -> Plan:
        """Nothing more is asked of us: what was promised is still loaded, and nobody's blocks are read any more."""
        self._saves = []
        self._stops += [name for name, known in self._requests.items() if known.saves]
        self._requests.clear()
        return self._drawn_up()

    def _drawn_up(self) -> Plan:
        plan = Plan(
            loads=tuple(self._loads), saves=tuple(self._saves), stops=tuple(self._stops), held=tuple(self._newly_held)
        )
        self._loads, self._saves, self._stops, self._newly_held = [], [], [], []
        return plan

    def heard(self, told: Iterable[Heard], sent: Collection[str]) -> None:
        """What the workers said after a step; `sent`: requests whose blocks they hold no longer."""
        for one in told:
            for loaded in one.loads:
                self._hear_load(loaded)
            for saved in one.saves:
                self._hear_save(saved)
        for name in sent:
            self._held.pop(name, None)

    def ended(self, request: Request, blocks: Blocks) -> tuple[bool, dict[str, Any] | None]:
        """A request is over: whether its blocks are held until they are saved, and what its answer says."""
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return False, None
        if known.loading:
            self._stops.append(request.request_id)  # the engine frees the blocks when the load is over
            return False, self._answer(known)
        if self._settings.save_generated and known.saved_tokens and not known.saves:
            self._save_generated(known, blocks)
        # A reset of the engine's cache takes blocks away between two steps, and the next one tells only of who is left.
        its_own = known.saves_preemptions == request.num_preemptions
        hold = known.saves > 0 and its_own and not self._is_beyond_window(request.num_computed_tokens)
        if known.saves and not hold:
            self._stops.append(request.request_id)
        if hold:
            self._held[request.request_id] = known
            self._newly_held.append(request.request_id)
        return hold, self._answer(known)

    @property
    def holds(self) -> bool:
        """Whether blocks of ended requests wait for their saves."""
        return bool(self._held)

    def give_way(self) -> bool:
        """The engine lacks blocks: those that are held are given back in its next step; whether there are any."""
        self._stops += [name for name in self._held if name not in self._stops]
        return bool(self._held)

    def tiers(self, request: Request, external: int) -> dict[str, int]:
        """From which tiers so many tokens come, of an ordered load: what leaves DDR first is the tail."""
        known = self._requests.get(request.request_id)
        found = known.found if known is not None else NOTHING
        nvme = min(found.tier_tokens.get("nvme", 0), external)
        return {tier: count for tier, count in (("ddr", external - nvme), ("nvme", nvme)) if count}

    def clear(self) -> None:
        """Forget what was stored of this model in this engine's pages. It may take seconds."""
        for known in self._requests.values():
            known.question = None
        if self._lookups is not None:
            self._lookups.clear()

    def take_counts(self) -> dict[str, float]:
        """Counters since the last call."""
        counts, self.counts = dict(self.counts), defaultdict(float)
        return counts

    def close(self) -> None:
        """Disconnect."""
        if self._lookups is not None:
            self._lookups.close()

    # Loads and saves ---------------------------------------------------------------------------

    def _may_load(self, known: _Request) -> bool:
        return (
            self._lookups is not None
            and not self._no_loads
            and known.wishes.load
            and not known.spoilt
            and not known.untold
            and not known.request.skip_reading_prefix_cache
            and known.request.num_tokens > self._page_tokens
        )

    def _ask(self, known: _Request, expires: float) -> Question | None:
        """Have it looked up; None where nobody could tell its KV from others'."""
        assert self._lookups is not None
        request = known.request
        tokens = _tokens(request, request.num_tokens)
        extras = self._extras(known, request.num_tokens)
        if extras is None:
            return None
        known.preemptions = request.num_preemptions
        known.expires, known.unanswered = expires, False
        known.question = self._lookups.ask(tokens, extras)
        self.counts["lookups"] += 1
        return known.question

    def _extras(self, known: _Request, count: int) -> Extras | None:
        extras = self._extras_of(known.request, self._page_tokens, count)
        known.untold = known.untold or extras is None
        return extras

    def _save_prompt(self, known: _Request, computed: int, blocks_of: Callable[[str], Blocks | None]) -> None:
        """Order a save when the prompt is prefilled with this step."""
        request, wishes = known.request, known.wishes
        if computed < request.num_prompt_tokens or known.not_saved is not None:
            return
        wanted = request.num_prompt_tokens
        if wishes.document is not None:
            wanted = min(wanted, wishes.document_tokens or wanted)
        begun = -(-wanted // self._page_tokens) * self._page_tokens  # a salt or picture in the last page counts as well
        exact = wishes.document is not None and self._canonical and not self._extras(known, begun)
        count = wanted if exact else wanted // self._page_tokens * self._page_tokens
        known.not_saved = self._why_not(known, count, computed)
        blocks = blocks_of(request.request_id) if known.not_saved is None else None
        if blocks is not None:
            self._save(known, count, blocks, wishes.document)

    def _is_beyond_window(self, computed: int) -> bool:
        """Whether the engine may have taken blocks away by then that a sliding window has passed."""
        return self._window is not None and computed > self._window

    def _why_not(self, known: _Request, count: int, computed: int) -> str | None:
        if not known.wishes.store:
            return "the request forbids it"
        if not count:
            return f"it is shorter than one page of {self._page_tokens} tokens"
        if self._is_beyond_window(computed):
            self.counts["saves_refused"] += 1
            return f"{computed} tokens are more than the model's sliding window of {self._window}: KV behind it is gone"
        cached = known.question.found if known.question is not None else None
        if known.wishes.document is None and cached is not None and cached.token_count >= count and not known.spoilt:
            return "it is stored already"
        return None

    def _save_generated(self, known: _Request, blocks: Blocks) -> None:
        request = known.request
        computed = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens)
        count = computed // self._page_tokens * self._page_tokens
        if count <= known.saved_tokens or known.wishes.document is not None:
            return
        if self._why_not(known, count, request.num_computed_tokens) is None:
            self._save(known, count, blocks, None)

    def _save(self, known: _Request, count: int, blocks: Blocks, name: str | None) -> None:
        request = known.request
        pages = -(-count // self._page_tokens)
        if any(NULL_BLOCK in table[:pages] or len(table) < pages for table in blocks):
            known.not_saved = "some of its blocks are gone"
            return
        extras = self._extras(known, count)
        if extras is None:
            known.not_saved = "its LoRA adapter cannot be told from others; the engine's log says why"
            return
        self._saves.append(
            Save(
                request=request.request_id,
                tokens=_tokens(request, count),
                extras=extras,
                blocks=tuple(table[:pages] for table in blocks),
                canonical=count % self._page_tokens > 0,
                name=name,
                pin=known.wishes.pin if name is not None else None,
            )
        )
        known.saved_tokens = count
        known.saves += self._ranks
        known.saves_preemptions = request.num_preemptions
        self.counts["saves"] += 1

    def _hear_load(self, loaded: Loaded) -> None:
        known = self._requests.get(loaded.request)
        self.counts["load_seconds"] += loaded.seconds
        if known is None:
            return
        known.loading -= 1
        if known.loaded is None or loaded.stop < known.loaded.stop:  # of several ranks the one that has least
            known.loaded = loaded
        if loaded.stop < known.ordered:
            known.spoilt = True
            self.counts["load_failures"] += 1
            self.counts["load_failed_tokens"] += known.ordered - loaded.stop
            self._complain(f"request {loaded.request} is computed from token {loaded.stop}: {loaded.problem}")
        tokens = (loaded.stop - known.computed) / self._ranks
        self.counts["load_tokens"] += tokens
        self.counts["load_bytes"] += tokens * self._token_bytes

    def _hear_save(self, saved: Saved) -> None:
        known = self._requests.get(saved.request) or self._held.get(saved.request)
        self.counts["save_seconds"] += saved.seconds
        self.counts["save_tokens"] += saved.token_count / self._ranks
        self.counts["save_bytes"] += saved.token_count / self._ranks * self._token_bytes
        if saved.problem is not None:
            self.counts["save_drops"] += 1
        if known is None:
            return
        known.saves -= 1
        if known.saved is None or saved.problem is not None:
            known.saved = saved

    def _complain(self, what: str) -> None:
        """Log it, but not every request's."""
        self._unsaid += 1
        if time.monotonic() >= self._quiet_until:
            others = f" (and {self._unsaid - 1} others since the last line)" if self._unsaid > 1 else ""
            LOG.warning("holdfast: %s%s", what, others)
            self._unsaid, self._quiet_until = 0, time.monotonic() + QUIET_SECONDS

    def _answer(self, known: _Request) -> dict[str, Any] | None:
        """What the request's answer says of us, when it asked."""
        if not known.wishes.asked:
            return None
        loaded = known.loaded
        answer: dict[str, Any] = {
            "document": known.found.document,
            "hit_tokens": max(loaded.stop - known.computed, 0) if loaded is not None else 0,
            "tier_tokens": {tier: count for tier, count in known.found.tier_tokens.items() if count},
            "receipt": loaded.receipt if loaded is not None else None,
            "saved": self._saved(known),
            "saved_tokens": known.saved.token_count if known.saved is not None else 0,
        }
        problems = [*known.wishes.problems]
        if loaded is not None and loaded.problem:
            problems.append(loaded.problem)
        if known.saved is not None and known.saved.pin_problem:
            problems.append(known.saved.pin_problem)
        return {"holdfast": answer | ({"problems": problems} if problems else {})}

    def _saved(self, known: _Request) -> bool | str:
        if known.saves:
            return "under way"
        if known.saved is not None:
            return known.saved.problem or True
        if self._lookups is None:
            return "this engine's KV is not cached; its log says why"
        return known.not_saved or self._no_saves or "the prompt was not prefilled"


def _tokens(request: Request, count: int) -> Tokens:
    return np.array(request.all_token_ids[:count], dtype=np.uint32)
