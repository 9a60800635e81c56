"""Groups of different cp and tp on one daemon: what one ingests another answers, as the dense model does."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import pytest
from driver_process import CONFIG, group
from engine_contract import Degree
from holdfast.engine_adapter import group as group_module
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.control import Failed
from holdfast.engine_adapter.engine import Question
from holdfast.engine_adapter.pages import FORMATS, native
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import GroupFailed, HoldfastError, InvalidRequest
from holdfast.ring_attention.checkpoint import load_model
from holdfast.ring_attention.synthetic import Scales, write_checkpoint

from daemon_process import DaemonProcess, until

SETTINGS = {
    "ddr__capacity_bytes": "64 MiB",
    "ddr__slab_bytes": "8 MiB",
    "nvme__capacity_bytes": "64 MiB",
    "nvme__segment_bytes": "8 MiB",
}
MEMORY = WritePolicy.MEMORY  # so that it can be deleted at once
NEW = 5
CHUNK = 32
DEGREES = (Degree(2, 1), Degree(1, 2), Degree(2, 2))


class Groups:
    """One of each degree, and the dense model to compare with."""

    def __init__(self, daemon, stack):
        self.daemon = daemon
        directory = daemon.directory / "model"
        write_checkpoint(directory, CONFIG, scales=Scales(attention=1.0))
        self.model = load_model(directory)
        with ThreadPoolExecutor(len(DEGREES)) as pool:  # most of a start is waiting
            engines = pool.map(lambda degree: self.start(directory, degree), DEGREES)
        self.engines = {degree: stack.enter_context(engine) for degree, engine in zip(DEGREES, engines, strict=True)}
        self.client = stack.enter_context(closing(Client(daemon.socket)))

    def start(self, directory, degree):
        """Pass-Q where the head ranks share tokens too; the other tests of groups pass KV."""
        name, strategy = f"g{degree.cp}{degree.tp}", "pass_q" if degree.tp > 1 else "pass_kv"
        return group(directory, name, degree.cp, self.daemon.socket, 400, tp=degree.tp, strategy=strategy)

    def session(self, degree):
        return Session(self.client, self.engines[degree])

    def check(self, answer, before):
        """Every row of logits is that of a dense pass over all the tokens before it."""
        wanted = self.model.dense_logits([*before, *answer.tokens[:-1]], len(answer.tokens)).numpy()
        assert np.abs(answer.logits - wanted).max() < 1e-4
        assert wanted.argmax(-1).tolist() == answer.tokens


@pytest.fixture(scope="module")
def groups():
    with DaemonProcess(**SETTINGS) as daemon, ExitStack() as stack:
        yield Groups(daemon.start(), stack)


def tokens(seed, count):
    return np.random.default_rng(seed).integers(0, CONFIG.vocabulary_size, count).tolist()


def test_what_any_degree_ingests_any_other_answers(groups):
    """The KV of several head ranks fills one extent; and what a group of another degree has grown, others read."""
    for number, writer in enumerate(DEGREES):
        name, document, question = f"by-{number}", tokens(number, 140), tokens(50 + number, 9)
        groups.session(writer).ingest(name, document, chunk_tokens=CHUNK)
        for reader in DEGREES:
            groups.check(groups.session(reader).ask(name, question, NEW).answer, [*document, *question])
        turn = groups.session(writer).converse(name, document, question, NEW, chunk_tokens=CHUNK)
        groups.check(turn.reply.answer, [*document, *question])
        assert turn.reason == ""
        asked = tokens(60 + number, 4)
        for reader in DEGREES:
            groups.check(groups.session(reader).ask(name, asked, NEW).answer, [*turn.tokens, *asked])
        groups.client.delete(name)


@pytest.mark.parametrize("name", ["vllm-cpu-vec/1", "vllm-flash-nhd/1"])
def test_an_engines_pages_answer_as_canonical_kv_does(groups, name):
    """The same KV in pages of 24 tokens: equal logits, bit for bit, wherever the ranks' rows lie alike."""
    document, question = tokens(20, 6 * 24), tokens(21, 9)
    groups.session(Degree(2, 1)).ingest("canonical", document, write_policy=MEMORY, chunk_tokens=CHUNK)
    kv_heads, dim = CONFIG.kv_heads, CONFIG.head_dim
    spec = native(groups.engines[Degree(1, 2)].spec, FORMATS[name](24, kv_heads, dim, dim), accept="any")
    with Store(Client(groups.daemon.socket)) as store:
        with store.attach("canonical") as attached:
            kv = {layer.index: layer.gathered() for layer in attached.layers()}
        with store.ingest("pages", spec, document, write_policy=MEMORY) as writer:
            for layer, (key, value) in kv.items():
                writer.write(layer, 0, key, value)
    for degree in (Degree(1, 2), Degree(2, 2)):
        ours, theirs = (groups.session(degree).ask(name, question, NEW).answer for name in ("pages", "canonical"))
        assert np.array_equal(ours.logits, theirs.logits)
        groups.check(ours, [*document, *question])
    groups.check(groups.session(Degree(2, 1)).ask("pages", question, NEW).answer, [*document, *question])
    for stored in ("pages", "canonical"):
        groups.client.delete(stored)


def test_a_corrupted_extent_shows(groups):
    """The control: equality above means something. What lies in DDR is changed behind the daemon's back."""
    document, question = tokens(7, 140), tokens(8, 9)
    groups.session(Degree(2, 1)).ingest("spoilt", document, chunk_tokens=CHUNK)
    before = groups.session(Degree(1, 2)).ask("spoilt", question, NEW).answer
    groups.client.free("spoilt", "ddr")
    attached = groups.client.attach("spoilt")
    view = groups.client.views(attached.parts)[0]
    view[: len(view) // 16] = bytes(len(view) // 16)
    groups.client.detach(attached.lease)
    after = groups.session(Degree(1, 2)).ask("spoilt", question, NEW).answer
    assert np.abs(after.logits[0] - before.logits[0]).max() > 1e-2
    groups.client.delete("spoilt")


def test_one_group_decodes_what_another_is_still_prefilling(groups):
    """Asked before it was published, answered as soon as it is; the group that prefilled may go on with the next."""
    document, question = tokens(9, 200), tokens(10, 9)
    asked = []
    with closing(Client(groups.daemon.socket)) as client, ThreadPoolExecutor(1) as pool:
        decoding = Session(client, groups.engines[Degree(1, 2)])

        def asks(_):
            if not asked:
                asked.append(pool.submit(decoding.ask, "early", question, NEW, wait_seconds=60.0))

        groups.session(Degree(2, 1)).ingest("early", document, chunk_tokens=CHUNK, progress=asks)
        reply = asked[0].result(60)
    groups.check(reply.answer, [*document, *question])
    assert reply.swap.source_tier == "ddr"
    assert reply.swap.exposed_ns <= reply.swap.prefill_ns
    groups.client.delete("early")


def test_who_stops_listening_ends_the_call_early(groups):
    """A long answer and a long prefill end within a token and a chunk, and the group goes on."""

    class TestError(Exception):
        pass

    session, document = groups.session(Degree(2, 2)), tokens(11, 60)
    session.ingest("report", document, chunk_tokens=CHUNK)
    heard = []

    def stops(number):
        heard.append(number)
        raise TestError

    with pytest.raises(TestError):
        session.ask("report", [1], 10**5, on_token=stops)
    with pytest.raises(TestError):
        session.ingest("long", tokens(12, 390), chunk_tokens=1, progress=stops)
    assert len(heard) == 2
    groups.check(session.ask("report", [5], NEW).answer, [*document, 5])
    groups.client.delete("report")


def test_a_rank_that_stalls_ends_the_call_everywhere(groups, monkeypatch):
    """Within the deadline of the collectives and what follows; nothing is left, and the daemon frees its place."""
    monkeypatch.setattr(group_module, "LAG_SECONDS", 0.5)
    directory, document = groups.daemon.directory / "model", tokens(13, 60)
    with group(directory, "stalls", 2, groups.daemon.socket, 300, collective_seconds=2.0) as engine:
        session = Session(groups.client, engine)
        session.ingest("stalled", document, chunk_tokens=CHUNK)
        with session.attached("stalled") as attached:
            os.kill(engine.pids[1], signal.SIGSTOP)
            with pytest.raises(HoldfastError, match="did not answer"):
                engine.answer_many([Question(attached.shard, [1, 2], NEW)])
        with pytest.raises(GroupFailed):
            engine.recompute([1], [2], 1, CHUNK)
    gave_up, refused = Failed(GroupFailed.code, "waited for rank 1"), Failed(InvalidRequest.code, "no")
    assert group_module.lag_seconds(gave_up, 120.0) == 0.5, "the others have waited as long"
    assert group_module.lag_seconds(refused, 120.0) == 120.5, "the others have only begun to wait"
    until(lambda: not any(found["name"] == "stalls" for found in groups.daemon.groups()), "the group is gone")
    groups.client.delete("stalled")
