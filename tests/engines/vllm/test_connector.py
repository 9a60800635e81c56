"""HoldfastConnector in real vLLM engines, one after the other and at once: always Transformers' tokens."""

from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from holdfast.engine_adapter.api import connect
from holdfast.engine_adapter.checkpoint_identity import checkpoint_spec
from holdfast.engine_adapter.pages import native, vllm_cpu_vec
from transformers import AutoModelForCausalLM
from vllm_engine import Engine, Prompt, Server

from daemon_process import until

pytestmark = pytest.mark.timeout(600)  # engines take their time to start on a busy machine
PAGE = 32
BLOCKS = 66  # of the engines: what several long answers want is more
LONG = 1500


def tokens(name, count=LONG):
    return np.random.default_rng(list(name.encode())).integers(0, 256, count).tolist()


HEAD = tokens("head", 20 * PAGE)
PROMPTS = {
    "long": tokens("long"),
    "long, other end": tokens("long", LONG - 300) + tokens("other", 300),
    "salted": tokens("salted"),
    "secret": tokens("secret"),
    "report": tokens("report", 1000) + tokens("question", 40),
    "report, other question": tokens("report", 1000) + tokens("another", 40),
    "whole report": tokens("whole", 10 * PAGE) + tokens("question", 40),
    "both": tokens("both"),
    "wrong": tokens("wrong"),
    **{f"crowd {number}": HEAD + tokens(f"crowd {number}", 200) for number in range(4)},
}
CROWD = [name for name in PROMPTS if name.startswith("crowd")]
CROWD_COUNT = 160  # tokens that each of the crowd answers: together more than the engine has blocks for


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What Transformers answers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = {}
    for name, prompt in PROMPTS.items():
        count = CROWD_COUNT if name in CROWD else 8
        with torch.no_grad():
            answer = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found[name] = answer[0, len(prompt) :].tolist()
    return found


@pytest.fixture(scope="module")
def engines(checkpoint, daemon):
    """An offline engine and an OpenAI server, at once."""
    with ExitStack() as stack:
        sizes = {"num_gpu_blocks_override": BLOCKS, "max_model_len": 63 * PAGE}
        offline = Engine(checkpoint, daemon.socket, options=sizes, core=0)
        flags = {key.replace("_", "-"): value for key, value in sizes.items()}
        server = Server(checkpoint, daemon.socket, options=flags, core=1)
        for engine in (offline, server):
            stack.callback(engine.start().close)
        for engine in (offline, server):
            engine.wait_ready()
        yield offline, server


@pytest.fixture
def writer(engines):
    return engines[0]


@pytest.fixture
def reader(engines):
    return engines[1]


@pytest.fixture(autouse=True)
def forget(engines):
    yield
    for engine in engines:
        assert engine.forget()


def ask(engine, name, count=8, **given):
    """One prompt's answer, once its save is over."""
    (answer,) = engine.ask([Prompt(PROMPTS[name], count=count, **{"params": {"load": True}, **given})])
    until(engine.forget, "its blocks are free")
    return answer


def test_another_engine_goes_on_from_what_one_has_prefilled(writer, reader, reference):
    first = ask(writer, "long")
    assert first.tokens == reference["long"]
    assert first.holdfast["hit_tokens"] == 0
    second = ask(reader, "long")
    assert second.tokens == reference["long"]
    assert second.cached == second.holdfast["hit_tokens"] == LONG // PAGE * PAGE
    assert second.holdfast["tier_tokens"]["ddr"] == LONG // PAGE * PAGE
    assert second.holdfast["receipt"]["outcome"] == "ready"
    assert second.holdfast["saved"] == "it is stored already"
    again = ask(writer, "long")  # it comes back to the first as well
    assert (again.tokens, again.cached) == (reference["long"], LONG // PAGE * PAGE)


def test_as_much_of_a_prompt_as_is_stored_is_loaded(writer, reader, reference):
    ask(writer, "long")
    answer = ask(reader, "long, other end")
    assert answer.tokens == reference["long, other end"]
    assert answer.cached == (LONG - 300) // PAGE * PAGE


def test_what_was_stored_is_what_is_used(reader, daemon, checkpoint, reference):
    """A control: pages that are not the prompt's change its answer."""
    spec = native(checkpoint_spec(checkpoint), vllm_cpu_vec(PAGE, 4, 64, 64))
    stored = np.array(PROMPTS["wrong"][: LONG // PAGE * PAGE], np.uint32)
    rng = np.random.default_rng(0)

    def noise(_, pages):
        pages.view(np.float32)[:] = rng.standard_normal(pages.view(np.float32).shape, np.float32)

    with connect(daemon.socket) as store, store.ingest(None, spec, stored) as ingest:
        for layer in spec.groups[0].layers:
            ingest.write_pages(layer, 0, len(stored) // PAGE, noise)
    answer = ask(reader, "wrong")
    assert answer.cached == len(stored)
    assert answer.tokens != reference["wrong"]


def test_prompts_of_different_salts_do_not_share(writer, reader, reference):
    assert ask(writer, "salted", salt="mine").tokens == reference["salted"]
    for salt in (None, "yours"):
        other = ask(reader, "salted", salt=salt)
        assert (other.tokens, other.cached) == (reference["salted"], 0)
    same = ask(reader, "salted", salt="mine")
    assert (same.tokens, same.cached) == (reference["salted"], LONG // PAGE * PAGE)


def test_a_request_can_forbid_storing_and_loading(writer, reader, reference):
    assert "forbids" in ask(writer, "secret", params={"store": False}).holdfast["saved"]
    assert ask(reader, "secret").cached == 0
    answer = ask(writer, "secret", params={"load": False})
    assert (answer.tokens, answer.cached) == (reference["secret"], 0)


@pytest.mark.parametrize(("name", "count"), [("report", 1000), ("whole report", 10 * PAGE)])
def test_a_document_is_named_pinned_and_found_by_the_next_question(writer, reader, daemon, reference, name, count):
    params = {"document": name, "document_tokens": count, "pin": {"owner": "tests", "reason": "asked for"}}
    if name == "report":  # through the body of a request to the server
        writer, reader = reader, writer
    answer = ask(writer, name, params=params)
    assert answer.tokens == reference[name]
    with connect(daemon.socket) as store:
        document = store.document(name)
        assert (document.token_count, document.complete) == (count, True)
        assert document.page_format == ("" if count % PAGE else f"vllm-cpu-vec/1:tokens={PAGE}")
        (pin,) = [pin for pin in store.pins() if pin.document == name]
        assert (pin.owner, pin.reason) == ("tests", "asked for")
        store.unpin(name)
    question = "report, other question" if name == "report" else name
    answer = ask(reader, question)
    unit = 64 if count % PAGE else PAGE  # a block of the form that it is stored in
    assert (answer.tokens, answer.cached) == (reference[question], count // unit * unit)
    assert answer.holdfast["document"] == name
    assert answer.holdfast["receipt"]["document"].endswith(name)


def test_wrong_parameters_are_told_and_the_request_goes_on(writer, reference):
    answer = ask(writer, "secret", params={"document": ["?"], "store": False})
    assert answer.tokens == reference["secret"]
    assert "document is a name" in answer.holdfast["problems"][0]


def test_two_engines_store_one_prompt_at_once(writer, reader, daemon, reference):
    for engine in (writer, reader):
        engine.begin([Prompt(PROMPTS["both"], params={})])
    for engine in (writer, reader):
        assert engine.end()[0].tokens == reference["both"]
        until(engine.forget, "its blocks are free")
    answer = ask(reader, "both")
    assert (answer.tokens, answer.cached) == (reference["both"], LONG // PAGE * PAGE)


def test_a_crowd_that_preempts_its_members_answers_right(writer, reader, reference):
    """Blocks are taken from requests whose prompts are being saved, and given to others."""

    def preempts(engine):
        """Ask all at once, again where one was over before the others needed its blocks."""
        before = engine.metrics()["vllm:num_preemptions"]
        answers = engine.ask([Prompt(PROMPTS[name], count=CROWD_COUNT, params={}) for name in CROWD])
        assert [answer.tokens for answer in answers] == [reference[name] for name in CROWD]
        until(engine.forget, "its blocks are free")
        return engine.metrics()["vllm:num_preemptions"] > before

    for engine in (writer, reader):
        until(partial(preempts, engine), "it preempts", 120)


def test_hits_are_counted_by_tier(writer, reader):
    ask(writer, "long")
    before = reader.metrics()
    ask(reader, "long")
    after = reader.metrics()
    count = LONG // PAGE * PAGE
    for name in ("vllm:external_prefix_cache_hits", "vllm:holdfast_load_tokens"):
        assert after[name] - before[name] == count
    by_tier = "vllm:prompt_tokens_cached_by_source:host"
    assert after[by_tier] - before[by_tier] == count


def test_a_reset_of_the_connector_clears_what_was_stored(writer, reader, reference):
    ask(writer, "long")
    assert reader.forget("too")
    answer = ask(reader, "long")
    assert (answer.tokens, answer.cached) == (reference["long"], 0)


def test_clients_that_hang_up_leave_a_server_that_answers(reader, reference):
    body = reader.body(Prompt(PROMPTS["both"], count=500), stream=True)
    for _ in range(3):
        with reader.post("/v1/completions", body) as answer:
            answer.readline()
    until(reader.forget, "its blocks are free")
    assert ask(reader, "both").tokens == reference["both"]
