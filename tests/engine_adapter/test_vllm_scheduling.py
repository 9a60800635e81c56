"""The connector's scheduler side, without an engine: what it promises, orders, holds and answers. It never waits."""

from dataclasses import replace

import pytest
from holdfast.engine_adapter.vllm.lookups import Question
from holdfast.engine_adapter.vllm.plans import Heard, Loaded, Plan, Ready, Saved
from holdfast.engine_adapter.vllm.scheduling import SchedulerSide
from holdfast.engine_adapter.vllm.settings import Settings
from holdfast.engine_adapter.vllm.wishes import PinWish
from vllm_cases import PAGE, READY, SPEC, FakeLookups, blocks, request

NO_DOCUMENT = {"document": None, "hit_tokens": 0, "tier_tokens": {}, "receipt": None, "saved_tokens": 0}


def extras_of(one, page, count):
    """Of whole pages only, as the engine's."""
    return {number: extra for number, extra in one.extras.items() if (number + 1) * page <= count}


class Side:
    """A scheduler side, and the engine around it."""

    def __init__(self, ranks=(READY,), **settings):
        self.side = SchedulerSide(Settings(**settings), extras_of)
        self.lookups = FakeLookups()
        self.side.open(ranks, lambda _: self.lookups)

    def arrive(self, one, found=None):
        self.side.arrived(one)
        if found is not None:
            self.lookups.answer(found)
        return one

    def plan(self, scheduled=(), preempted=()):
        """One step, in which these requests go on by so many tokens."""
        scheduled = dict(scheduled)
        plan = self.side.plan(
            {one.request_id: count for one, count in scheduled.items()}, preempted, lambda _: blocks(20)
        )
        for one, count in scheduled.items():
            one.num_computed_tokens += count
        assert plan.idle == (not scheduled)
        return replace(plan, idle=False)

    def load(self, one, computed=0):
        """What is promised is allocated, and ordered."""
        count, _ = self.side.matched(one, computed)
        self.side.allocated(one, blocks(20), count)
        return self.plan()

    def loaded(self, name, stop, **given):
        self.side.heard([Heard(loads=(Loaded(request=name, stop=stop, seconds=0.1, **given),))], ())

    def saved(self, name, count=10 * PAGE, **given):
        self.side.heard([Heard(saves=(Saved(request=name, token_count=count, seconds=0.1, **given),))], ())


@pytest.fixture
def engine():
    return Side()


def ended(engine, one):
    return engine.side.ended(one, blocks(20))


# Lookups ---------------------------------------------------------------------------------------


def test_a_prompt_is_not_known_until_it_is_and_then_loaded_beside_other_work(engine):
    one = engine.arrive(request())
    assert engine.side.matched(one, 0) == (None, False)
    engine.lookups.answer(4 * PAGE)
    assert engine.side.matched(one, 0) == (4 * PAGE, True)
    assert engine.side.matched(one, PAGE) == (3 * PAGE, True)
    assert engine.side.matched(one, 4 * PAGE) == (0, False)
    assert len(engine.lookups.questions) == 1


def test_an_engine_with_nothing_else_to_do_waits_a_little_for_the_answer(engine, monkeypatch):
    """With anything to do it does not."""
    waits = []
    monkeypatch.setattr(Question, "wait", lambda question, seconds: waits.append(question))
    one, other = engine.arrive(request()), engine.arrive(request("other"), found=0)
    for scheduled in ({}, {other: 1}, {}):
        if scheduled or not waits:
            assert engine.side.matched(one, 0) == (None, False)
        engine.plan(scheduled)
    assert waits == [engine.lookups.questions[0]]


def test_one_token_is_left_to_compute(engine):
    one = engine.arrive(request(count=10 * PAGE), found=10 * PAGE)
    assert engine.side.matched(one, 0) == (9 * PAGE, True)


def test_after_the_deadline_the_request_is_computed():
    engine = Side(lookup_seconds=1e-9)
    one = engine.arrive(request())
    assert engine.side.matched(one, 0) == (0, False)
    engine.lookups.answer(4 * PAGE)  # too late for this one
    assert engine.side.matched(one, 0)[0] in (0, 4 * PAGE)


def test_what_nobody_can_say_is_not_asked_again(engine):
    one = engine.arrive(request())
    engine.lookups.questions[-1].miss()
    assert engine.side.matched(one, 0) == (0, False)
    assert engine.side.matched(one, 0) == (0, False)
    assert len(engine.lookups.questions) == 1
    assert engine.side.take_counts()["lookup_failures"] == 1


@pytest.mark.parametrize(
    "given",
    [{"kv_transfer_params": {"load": False}}, {"skip_reading_prefix_cache": True}, {"count": PAGE}],
    ids=["forbidden", "logprobs", "short"],
)
def test_some_requests_are_not_looked_up(engine, given):
    one = engine.arrive(request(**given))
    assert engine.side.matched(one, 0) == (0, False)
    assert not engine.lookups.questions


def test_after_a_preemption_the_answer_so_far_is_looked_up_with_the_prompt(engine):
    one = engine.arrive(request(), found=4 * PAGE)
    engine.load(one)
    engine.loaded("r", 4 * PAGE)
    one.all_token_ids += [1] * PAGE
    one.num_preemptions += 1
    assert engine.side.matched(one, 0) == (None, False)
    assert len(engine.lookups.questions[-1].tokens) == one.num_tokens
    engine.lookups.answer(5 * PAGE)
    assert engine.side.matched(one, 0) == (5 * PAGE, True)


def test_what_was_found_before_a_reset_is_not_loaded_after_it(engine):
    one = engine.arrive(request(), found=4 * PAGE)
    engine.side.clear()
    assert engine.lookups.cleared
    assert engine.side.matched(one, 0) == (None, False)
    engine.lookups.answer(0)
    assert engine.side.matched(one, 0) == (0, False)


def test_an_engine_without_workers_that_keep_kv_caches_nothing():
    engine = Side(ranks=[READY, Ready(reason="no")])
    one = engine.arrive(request())
    assert engine.side.matched(one, 0) == (0, False)
    assert engine.plan({one: one.num_tokens}) == Plan()
    assert ended(engine, one) == (False, None)
    assert engine.side.take_counts() == {"unserved": 1}


# Loads -----------------------------------------------------------------------------------------


def test_a_load_names_the_blocks_of_what_the_engine_lacks(engine):
    one = engine.arrive(request(), found=4 * PAGE)
    (order,) = engine.load(one, computed=PAGE).loads
    assert (order.start, order.stop) == (PAGE, 4 * PAGE)
    assert order.blocks == ([2, 3, 4],)
    assert order.tokens.tolist() == one.all_token_ids[: 4 * PAGE]
    assert engine.plan() == Plan()


def test_what_a_load_did_not_bring_is_computed_and_not_tried_again(engine):
    one = engine.arrive(request(kv_transfer_params={}), found=4 * PAGE)
    engine.load(one)
    engine.loaded("r", 2 * PAGE, problem="damaged", receipt={"id": 7})
    assert engine.side.matched(one, 0) == (0, False)
    engine.plan({one: one.num_tokens})
    _, answer = ended(engine, one)
    assert answer["holdfast"]["hit_tokens"] == 2 * PAGE
    assert answer["holdfast"]["receipt"] == {"id": 7}
    assert answer["holdfast"]["problems"] == ["damaged"]


def test_of_several_ranks_the_one_that_has_least_counts():
    engine = Side(ranks=[READY] * 3)
    one = engine.arrive(request(kv_transfer_params={}), found=4 * PAGE)
    engine.load(one)
    for stop in (4 * PAGE, PAGE, 3 * PAGE):
        engine.loaded("r", stop)
    assert ended(engine, one)[1]["holdfast"]["hit_tokens"] == PAGE


def test_a_request_that_ends_while_it_loads_takes_its_blocks_back(engine):
    one = engine.arrive(request(), found=4 * PAGE)
    engine.load(one)
    assert ended(engine, one) == (False, None)  # the engine frees them when the load is over
    assert engine.plan() == Plan(stops=("r",))
    engine.loaded("r", 0)


def test_a_request_that_ends_while_one_rank_still_loads_takes_its_blocks_back_and_saves_nothing():
    """It was preempted after its prompt was saved, and lost what it had generated."""
    engine = Side(ranks=[READY, READY], save_generated=True)
    one = engine.arrive(request(), found=0)
    engine.plan({one: one.num_tokens})
    for _ in range(2):
        engine.saved("r")
    one.all_token_ids += [1] * (4 * PAGE)
    one.num_computed_tokens, one.num_preemptions = 0, 1
    engine.plan(preempted=["r"])
    engine.side.matched(one, 0)
    engine.lookups.answer(13 * PAGE)
    engine.load(one)
    one.num_computed_tokens = 13 * PAGE
    engine.loaded("r", 13 * PAGE)
    assert ended(engine, one) == (False, None)
    assert engine.plan() == Plan(stops=("r",))


# Saves -----------------------------------------------------------------------------------------


def test_a_prompt_is_saved_in_whole_pages_when_its_last_chunk_is_computed(engine):
    one = engine.arrive(request(), found=0)
    assert not engine.plan({one: 5 * PAGE}).saves
    (order,) = engine.plan({one: 5 * PAGE + 5}).saves
    assert order.tokens.tolist() == one.all_token_ids[: 10 * PAGE]
    assert order.blocks == (list(range(1, 11)),)
    assert order.name is None
    assert not engine.plan({one: 1}).saves


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"kv_transfer_params": {"store": False}}, "forbids"),
        ({"kv_transfer_params": {}, "count": PAGE - 1}, "shorter"),
        ({"kv_transfer_params": {}, "count": 4 * PAGE + 1}, "stored already"),
    ],
)
def test_some_prompts_are_not_saved(engine, given, why):
    one = engine.arrive(request(**given))
    if engine.lookups.questions:
        engine.lookups.answer(4 * PAGE)
    assert not engine.plan({one: one.num_tokens}).saves
    assert why in ended(engine, one)[1]["holdfast"]["saved"]


def test_a_named_document_is_its_first_tokens_also_when_they_are_stored_already(engine):
    params = {"document": "report", "document_tokens": 6 * PAGE + 3, "pin": {"tier": "nvme", "ttl_seconds": 5}}
    one = engine.arrive(request(kv_transfer_params=params), found=10 * PAGE)
    (order,) = engine.plan({one: one.num_tokens}).saves
    assert (order.name, order.canonical) == ("report", True)  # it ends within a page
    assert len(order.tokens) == 6 * PAGE + 3
    assert order.blocks == (list(range(1, 8)),)
    assert order.pin == PinWish(tier="nvme", ttl_seconds=5)


def test_where_nobody_else_reads_the_pages_a_document_is_whole_pages():
    engine = Side(ranks=[Ready(spec=SPEC)])
    one = engine.arrive(request(kv_transfer_params={"document": "report", "document_tokens": 6 * PAGE + 3}), found=0)
    (order,) = engine.plan({one: one.num_tokens}).saves
    assert (len(order.tokens), order.canonical) == (6 * PAGE, False)


@pytest.mark.parametrize(
    ("count", "page", "saved"), [(20, 0, []), (3 * PAGE + 5, 3, [3 * PAGE])], ids=["short", "tail"]
)
def test_a_page_that_is_not_whole_and_has_an_extra_part_never_becomes_the_models_own_kv(engine, count, page, saved):
    params = {"document": "report", "document_tokens": count}
    one = engine.arrive(request(kv_transfer_params=params, extras={page: b"salt, adapter or picture"}), found=0)
    saves = engine.plan({one: one.num_tokens}).saves
    assert [(len(order.tokens), order.canonical) for order in saves] == [(count, False) for count in saved]


def test_a_prompt_that_left_the_store_meanwhile_is_saved_again(engine):
    one = engine.arrive(request(), found=10 * PAGE)
    engine.load(one)
    engine.loaded("r", 0, problem="gone")
    assert engine.plan({one: one.num_tokens}).saves


def test_blocks_of_an_ended_request_are_held_until_they_are_saved(engine):
    one = engine.arrive(request(kv_transfer_params={}), found=0)
    engine.plan({one: one.num_tokens})
    hold, answer = ended(engine, one)
    assert hold
    assert answer == {"holdfast": {**NO_DOCUMENT, "saved": "under way"}}
    assert engine.side.holds
    assert engine.plan() == Plan(held=("r",))
    assert engine.plan() == Plan()
    engine.saved("r")
    assert engine.side.holds
    engine.side.heard([], ["r"])
    assert not engine.side.holds


def test_a_request_whose_save_is_over_is_not_held(engine):
    one = engine.arrive(request(kv_transfer_params={}), found=0)
    engine.plan({one: one.num_tokens})
    engine.saved("r")
    assert ended(engine, one) == (False, {"holdfast": {**NO_DOCUMENT, "saved": True, "saved_tokens": 10 * PAGE}})
    assert engine.plan() == Plan()


def test_all_ranks_have_to_save():
    engine = Side(ranks=[READY, READY])
    one = engine.arrive(request(kv_transfer_params={}), found=0)
    engine.plan({one: one.num_tokens})
    engine.saved("r", problem="full")
    hold, answer = ended(engine, one)
    assert hold
    assert answer["holdfast"]["saved"] == "under way"


def test_a_preempted_request_is_not_read_any_more_and_saved_when_it_was_computed_again(engine):
    one = engine.arrive(request(), found=0)
    engine.plan({one: one.num_tokens})
    one.num_computed_tokens = 0
    assert engine.plan(preempted=["r"]).stops == ("r",)
    engine.saved("r", 0, problem="taken away")
    assert engine.plan({one: one.num_tokens}).saves


def test_a_request_that_a_reset_preempted_and_that_ends_before_the_next_step_is_not_read_any_more(engine):
    """Its blocks were given back; the step that preempts it does not know it any more."""
    one = engine.arrive(request(), found=0)
    engine.plan({one: one.num_tokens})
    one.num_computed_tokens, one.num_preemptions = 0, 1
    assert ended(engine, one) == (False, None)
    assert engine.plan(preempted=["r"]) == Plan(stops=("r",))


def test_where_the_engine_lacks_blocks_saves_give_way(engine):
    one = engine.arrive(request(), found=0)
    assert not engine.side.give_way()
    engine.plan({one: one.num_tokens})
    assert not engine.side.give_way()  # it runs: its blocks are its own
    ended(engine, one)
    assert engine.side.give_way()
    assert engine.plan() == Plan(stops=("r",), held=("r",))


def test_what_cannot_be_told_from_others_is_neither_loaded_nor_saved():
    side = SchedulerSide(Settings(save_generated=True), lambda *_: None)
    lookups = FakeLookups()
    side.open([READY], lambda _: lookups)
    one = request(kv_transfer_params={"document": "report"})
    side.arrived(one)
    assert side.matched(one, 0) == (0, False)
    assert not lookups.questions
    assert side.plan({"r": one.num_tokens}, (), lambda _: blocks(20)) == Plan()
    hold, answer = side.ended(one, blocks(20))
    assert not hold
    assert "cannot be told" in answer["holdfast"]["saved"]


@pytest.mark.parametrize("table", [[0, *range(1, 10)], list(range(1, 10))])
def test_a_prompt_of_which_blocks_are_gone_is_not_saved(engine, table):
    one = engine.arrive(request(kv_transfer_params={}), found=0)
    assert engine.side.plan({"r": one.num_tokens}, (), lambda _: (list(range(1, 20)), table)).saves == ()
    assert "gone" in ended(engine, one)[1]["holdfast"]["saved"]


@pytest.fixture
def windowed():
    return Side(ranks=[Ready(spec=SPEC, window=5 * PAGE)])


def test_more_than_a_sliding_window_is_not_saved(windowed):
    short, long = request("short", 5 * PAGE), request("long", 5 * PAGE + 1, kv_transfer_params={})
    for one in (short, long):
        windowed.arrive(one, found=0)
    assert [order.request for order in windowed.plan({short: 5 * PAGE, long: 5 * PAGE + 1}).saves] == ["short"]
    assert "sliding window" in ended(windowed, long)[1]["holdfast"]["saved"]


def test_blocks_that_a_sliding_window_passes_are_not_read_any_more(windowed):
    """The engine frees them while their request goes on."""
    one = windowed.arrive(request(count=4 * PAGE), found=0)
    assert windowed.plan({one: 4 * PAGE}).saves
    assert windowed.plan({one: PAGE}) == Plan()
    assert windowed.plan({one: 1}) == Plan(stops=("r",))


def test_an_ended_request_whose_window_has_passed_is_not_held(windowed):
    one = windowed.arrive(request(count=4 * PAGE), found=0)
    windowed.plan({one: 4 * PAGE})
    one.num_computed_tokens = 5 * PAGE + 1
    assert ended(windowed, one) == (False, None)
    assert windowed.plan().stops == ("r",)


def test_what_was_generated_is_saved_at_the_end_when_asked_for():
    engine = Side(save_generated=True)
    one = engine.arrive(request(count=4 * PAGE), found=0)
    engine.plan({one: one.num_tokens})
    engine.saved("r")
    one.all_token_ids += [1] * (2 * PAGE)
    one.num_computed_tokens = 6 * PAGE - 1
    assert ended(engine, one)[0]
    plan = engine.plan()
    assert plan.held == ("r",)
    (order,) = plan.saves
    assert order.tokens.tolist() == one.all_token_ids[: 5 * PAGE]


def test_an_engine_may_only_load_or_only_save():
    side = SchedulerSide(Settings(), lambda *_: {}, loads="no loads", saves="no saves")
    lookups = FakeLookups()
    side.open([READY], lambda _: lookups)
    one = request(kv_transfer_params={})
    side.arrived(one)
    assert side.matched(one, 0) == (0, False)
    assert side.plan({"r": one.num_tokens}, (), lambda _: blocks(20)) == Plan()
    assert side.ended(one, blocks(20))[1]["holdfast"]["saved"] == "no saves"


def test_after_a_bug_what_was_promised_is_loaded_and_nothing_is_read_any_more(engine):
    saving, loading, ending = (engine.arrive(request(name), found=4 * PAGE) for name in "sle")
    engine.plan({saving: saving.num_tokens, ending: ending.num_tokens})
    assert ended(engine, ending)[0]
    engine.side.matched(loading, 0)
    engine.side.allocated(loading, blocks(20), 4 * PAGE)
    plan = engine.side.abandon()
    assert [order.request for order in plan.loads] == ["l"]
    assert (plan.stops, plan.held, plan.saves) == (("s",), ("e",), ())
    assert engine.side.abandon() == Plan()


# Answers ---------------------------------------------------------------------------------------


def test_wrong_parameters_are_told_and_the_request_goes_on(engine):
    params = {"document": 5, "document_tokens": "all", "pin": {"level": 3}, "store": "no", "load": True}
    one = engine.arrive(request(kv_transfer_params=params), found=4 * PAGE)
    assert engine.side.matched(one, 0) == (4 * PAGE, True)
    problems = ended(engine, one)[1]["holdfast"]["problems"]
    assert [problem.split()[0] for problem in problems] == ["document", "document_tokens", "pin", "store"]


def test_a_pin_needs_a_document(engine):
    one = engine.arrive(request(kv_transfer_params={"pin": True}), found=0)
    (order,) = engine.plan({one: one.num_tokens}).saves
    assert order.pin is None
    assert ended(engine, one)[1]["holdfast"]["problems"] == ["pin needs a document"]


def test_counters_are_taken_once(engine):
    one = engine.arrive(request(), found=4 * PAGE)
    engine.load(one)
    engine.loaded("r", 3 * PAGE)
    counts = engine.side.take_counts()
    assert counts["lookups"] == counts["loads"] == counts["load_failures"] == 1
    assert counts["load_tokens"] == 3 * PAGE
    assert counts["load_failed_tokens"] == PAGE
    assert counts["load_bytes"] == 3 * PAGE * SPEC.bytes_per_token
    assert not engine.side.take_counts()


def test_what_left_ddr_first_is_the_tail(engine):
    one = engine.arrive(request())
    engine.lookups.answer(8 * PAGE)
    engine.lookups.questions[-1].found.tier_tokens.update({"ddr": 6 * PAGE, "nvme": 2 * PAGE})
    engine.load(one)
    assert engine.side.tiers(one, 8 * PAGE) == {"ddr": 6 * PAGE, "nvme": 2 * PAGE}
    assert engine.side.tiers(one, PAGE) == {"nvme": PAGE}
