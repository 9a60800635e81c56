"""Native documents in groups: decoded into the rows of any degree and layout, and out of them again, bit for bit."""

from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.engine import Question
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.pages import FORMATS, key_value, native, page_format
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    DocumentExists,
    GroupFailed,
    InUse,
    InvalidRequest,
    SpecMismatch,
)
from holdfast.kvstore.layout import SCHEMES, scheme
from holdfast.kvstore.spec import KVSpec, LayerGroup

from daemon_process import DaemonProcess, durable, until

GROUP = LayerGroup(layers=(0, 1), kv_heads=2, key_dim=8, value_dim=4)
SPEC = KVSpec(groups=(GROUP,), dtype="bfloat16", model="fake@1", vocabulary_size=64, block_tokens=16, extent_blocks=2)
PAGE = 24
NATIVE = replace(native(SPEC, FORMATS["vllm-cpu-vec/1"](PAGE, 2, 8, 4)), extent_blocks=2)
OTHER = replace(NATIVE, page_format="vllm-flash-hnd/1:tokens=24")
DEGREES = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4))
QUESTION = [4, 5]


def document_of(seed, pages):
    return [int(token) for token in np.random.default_rng(seed).integers(0, 64, pages * PAGE)]


class Stage:
    """A daemon, a group of each degree, and the KV that their model makes."""

    def __init__(self, daemon, stack, degrees=DEGREES, rows=500):
        self.daemon = daemon
        self.client = stack.enter_context(closing(Client(daemon.socket)))
        self.store = stack.enter_context(Store(Client(daemon.socket)))
        self.engines = {
            (cp, tp): stack.enter_context(
                closing(FakeEngine(f"g{cp}{tp}", SPEC, cp=cp, tp=tp, rows=rows, daemon_socket=daemon.socket))
            )
            for cp, tp in degrees
        }
        self.any = next(iter(self.engines.values()))

    def pages(self, tokens, spec=NATIVE):
        """What the engine of a spec's pages keeps for these tokens, by layer: uint8 [pages, page bytes]."""
        planes, form = self.any._made(tokens), page_format(spec)
        made = {}
        for layer in GROUP.layers:
            pages = np.zeros((len(tokens) // spec.block_tokens, form.elements), np.uint16)
            for part, view in enumerate(key_value(form, pages)):
                plane = planes[layer, part].view(np.uint16)
                for token in range(len(tokens)):
                    page, row = divmod(token, spec.block_tokens)
                    view[page, :, row] = plane[:, token]
            made[layer] = pages.view(np.uint8)
        return made

    def put(self, name, tokens, spec=NATIVE, pages=None, **more):
        pages = pages or self.pages(tokens, spec)
        with self.store.ingest(name, spec, tokens, **more) as writer:
            for first in range(0, len(tokens) // spec.block_tokens, 2):
                for layer in GROUP.layers:
                    count = min(2, len(pages[layer]) - first)
                    writer.write_pages(layer, first, count, filling(pages[layer]))
        return pages

    def stored(self, name):
        """A native document's pages by layer, as the store has them."""
        found = {layer: [] for layer in GROUP.layers}
        for window in self.store.windows(name, spec=NATIVE):
            for layer in window.layers():
                found[layer.index] += [np.array(view).reshape(-1, view.shape[-1]) for _, view in layer.pages()]
        return {layer: np.concatenate(views) for layer, views in found.items()}

    def forget(self, name):
        """Delete a document that may still be on its way to NVMe."""

        def deleted():
            with suppress(InUse):
                self.client.delete(name)
                return True

        until(deleted, "it may go")

    def answer(self, degree, name):
        return Session(self.client, self.engines[degree]).ask(name, QUESTION, 3).answer.tokens

    def wanted(self, tokens):
        return self.any.recompute(tokens, QUESTION, 3, 64).tokens


def filling(pages):
    def fill(first, view):
        view[...] = pages[first : first + len(view)]

    return fill


@pytest.fixture(scope="module")
def stage():
    with DaemonProcess(nvme__capacity_bytes="8 MiB") as daemon, ExitStack() as stack:
        yield Stage(daemon.start(), stack)


def test_every_degree_answers_from_pages_as_from_canonical_kv(stage):
    """Bit-exact: one wrong byte would change the answer (test_fake_engine has the control)."""
    tokens = document_of(1, 7)
    pages = stage.put("report", tokens)
    for degree in DEGREES:
        assert stage.answer(degree, "report") == stage.wanted(tokens)
    pages[1][3, 100] ^= 1
    stage.put("spoilt", document_of(2, 7), pages=pages)
    assert stage.answer((2, 2), "spoilt") != stage.wanted(document_of(2, 7))
    stage.put("other", tokens, spec=OTHER, pages=stage.pages(tokens))  # the control: one format read as another
    assert stage.answer((1, 1), "other") != stage.wanted(tokens)
    for name in ("report", "spoilt", "other"):
        stage.forget(name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", SCHEMES)
def test_any_layout_is_filled_from_pages_of_any_format(stage, name, layout):
    tokens = document_of(3, 5)
    spec = replace(native(SPEC, FORMATS[name](PAGE, 2, 8, 4), accept="any"), extent_blocks=2)
    stage.put("report", tokens, spec=spec)
    for (cp, tp), engine in stage.engines.items():
        attached = stage.client.attach("report", group=engine.group, layout=scheme(layout, len(tokens), cp, tp))
        (answer,) = engine.answer_many([Question(attached.shard, QUESTION, 3)])
        stage.client.detach(attached.lease)
        assert answer.tokens == stage.wanted(tokens)
    stage.forget("report")


def test_a_leave_and_a_return_through_nvme(stage):
    tokens = document_of(4, 9)
    pages = stage.put("report", tokens, write_policy=WritePolicy.THROUGH)
    until(lambda: durable(stage.client, "report"), "it is durable")
    for _ in range(2):
        stage.client.free("report")
        assert stage.answer((2, 1), "report") == stage.wanted(tokens)
        for layer, found in stage.stored("report").items():
            assert np.array_equal(found, pages[layer])
    stage.forget("report")


def test_rows_that_are_the_last_copy_are_encoded_again():
    """Out of the ranks' memory: the pages that come back are those that were stored."""
    tokens = document_of(5, 8)
    with DaemonProcess() as daemon, ExitStack() as stack:
        stage = Stage(daemon.start(), stack, degrees=((2, 2), (3, 1)))
        for degree in stage.engines:
            pages = stage.put("report", tokens, write_policy=WritePolicy.MEMORY)
            assert stage.answer(degree, "report") == stage.wanted(tokens)
            daemon.rest().post("/v1/evictions", {"bytes": stage.client.document("report").size_bytes, "to": "nvme"})
            assert stage.client.document("report").resident_bytes == {"hbm": len(tokens) * SPEC.bytes_per_token}
            stage.client.free("report", "ddr")
            for layer, found in stage.stored("report").items():
                assert np.array_equal(found, pages[layer])
            stage.forget("report")


def test_a_document_larger_than_ddr_streams_through_into_a_group():
    tokens = document_of(6, 3 * 350)
    with DaemonProcess(nvme__capacity_bytes="8 MiB") as daemon, ExitStack() as stack:
        stage = Stage(daemon.start(), stack, degrees=((2, 1),), rows=len(tokens))
        pages = stage.put("large", tokens)
        assert stage.client.document("large").size_bytes > 3 << 20
        for layer, found in stage.stored("large").items():
            assert np.array_equal(found, pages[layer])
        assert stage.answer((2, 1), "large") == stage.wanted(tokens)


def test_what_a_group_cannot_do_is_told(stage):
    tokens = document_of(7, 3)
    stage.put("report", tokens)
    session = Session(stage.client, stage.engines[2, 1])
    turn = session.converse("report", tokens, QUESTION, 3)
    assert (turn.document, turn.reason) == (None, "document-exists")
    assert turn.reply.answer.tokens == stage.wanted(tokens)
    with pytest.raises(DocumentExists, match="page format"):
        session.ingest("report", [*tokens, 1, 2])
    fingerprint = stage.client.register_spec(NATIVE)
    with pytest.raises(SpecMismatch, match="canonical"):
        stage.client.begin_ingest("new", fingerprint, tokens, group="g21")
    with pytest.raises(InvalidRequest, match="canonical"):
        FakeEngine("native", NATIVE, cp=1, rows=100, daemon_socket=stage.daemon.socket)
    stage.put("another-model", tokens, spec=replace(NATIVE, model="fake@2"))
    with pytest.raises(SpecMismatch):
        session.ask("another-model", QUESTION, 3)
    later = replace(NATIVE, page_format="later/7:tokens=24")
    stage.put("later", tokens, spec=later, pages=stage.pages(tokens))
    with pytest.raises(GroupFailed, match=r"later/7.*LayerKV\.pages"):
        session.ask("later", QUESTION, 3)
    assert session.ask_or_recompute("later", tokens, QUESTION, 3).answer.tokens == stage.wanted(tokens)
    assert stage.answer((2, 1), "report") == stage.wanted(tokens), "the group goes on"
    for name in ("report", "another-model", "later"):
        stage.forget(name)


def test_who_names_a_spec_gets_what_can_be_read_by_it(stage):
    """A canonical reader decodes pages; who asks for pages of one format is given no other."""
    tokens = document_of(8, 3)
    stage.put("report", tokens)
    with stage.store.attach("report", spec=SPEC) as document:
        assert document.spec == NATIVE
        planes = stage.any._made(tokens)
        for layer in document.layers():
            for part, array in enumerate(layer.gathered()):
                assert np.array_equal(array, planes[layer.index, part].view(np.uint16))
    stage.client.register_spec(OTHER)
    for spec in (OTHER, replace(SPEC, model="fake@2")):
        with pytest.raises(SpecMismatch), stage.store.attach("report", spec=spec):
            pass
    stage.forget("report")


# Lives of a native document ------------------------------------------------------------------------


def test_it_is_there_after_a_crash_warm_and_cold_and_the_check_finds_nothing():
    tokens = document_of(9, 8)
    with DaemonProcess() as daemon, ExitStack() as stack:
        stage = Stage(daemon.start(), stack, degrees=((1, 1),))
        pages = stage.put("report", tokens, write_policy=WritePolicy.THROUGH)
        until(lambda: durable(stage.client, "report"), "it is durable")
        stack.close()
        for cools in (False, True):
            daemon.kill()
            if cools:
                daemon.cool()
            daemon.start()
            found = daemon.rest().post("/v1/check", {"fix": False, "data": True, "deadline_seconds": 20})
            assert (found["state"], found["findings"]) == ("done", [])
            with ExitStack() as again:
                stage = Stage(daemon, again, degrees=((2, 1),))
                view = stage.client.document("report")
                assert (view.complete, view.page_format) == (True, NATIVE.page_format)
                for layer, raw in stage.stored("report").items():
                    assert np.array_equal(raw, pages[layer])
                assert stage.answer((2, 1), "report") == stage.wanted(tokens)


def test_a_spoilt_page_on_nvme_is_found_when_it_is_read(stage):
    """Every layer's plane of pages is sealed: a group is never given other bytes than were stored."""
    tokens = document_of(10, 4)
    stage.put("report", tokens, write_policy=WritePolicy.THROUGH)
    until(lambda: durable(stage.client, "report"), "it is durable")
    stage.client.free("report")
    page = stage.pages(tokens)[1][2].tobytes()
    (segment,) = [path for path in stage.daemon.data_dir.rglob("*") if path.is_file() and page in path.read_bytes()]
    content = segment.read_bytes()
    segment.write_bytes(content.replace(page, bytes(len(page))))
    session = Session(stage.client, stage.engines[2, 1])
    reply = session.ask_or_recompute("report", tokens, QUESTION, 3)
    assert (reply.answer.tokens, reply.swap) == (stage.wanted(tokens), None)
    assert reply.reason in ("group-failed", "corrupt-extent"), "whoever hears of it first"
    assert not stage.client.document("report").complete
    stage.put("report", tokens)
    assert stage.answer((2, 1), "report") == stage.wanted(tokens), "stored again, what was lost is there"
    stage.forget("report")


def test_it_grows_under_its_name_by_whole_pages(stage):
    """As an engine stores a conversation: what is there already is not asked for again."""
    tokens = document_of(11, 9)
    stage.put("chat", tokens[: 3 * PAGE])
    for count in (4, 9):
        asked, pages = [], stage.pages(tokens[: count * PAGE])
        with stage.store.ingest("chat", NATIVE, tokens[: count * PAGE]) as writer:
            for layer in GROUP.layers:

                def fill(first, view, own=pages[layer], asked=asked):
                    asked.append(first)
                    filling(own)(first, view)

                writer.write_pages(layer, 0, count, fill)
        assert min(asked) == (2 if count == 4 else 4), "from the last extent on, which was not full"
        assert stage.answer((2, 2), "chat") == stage.wanted(tokens[: count * PAGE])
    stage.forget("chat")


def test_complete_pages_go_to_nvme_while_the_rest_is_written(monkeypatch):
    monkeypatch.setattr("holdfast.engine_adapter.writer.EARLY_BATCH_BYTES", 64 << 10)
    tokens = document_of(12, 200)
    with DaemonProcess(ddr__capacity_bytes="8 MiB", nvme__capacity_bytes="16 MiB") as daemon, ExitStack() as stack:
        stage = Stage(daemon.start(), stack, degrees=((1, 1),))
        pages = stage.pages(tokens)
        with stage.store.ingest("early", NATIVE, tokens, write_policy=WritePolicy.THROUGH) as writer:
            for first in range(0, 200, 5):
                for layer in GROUP.layers:
                    writer.write_pages(layer, first, 5, filling(pages[layer]))
            for sealing in list(writer._sealing):
                sealing.result()
            assert any(target.given for target in writer._targets)
            with pytest.raises(InvalidRequest, match="handed over"):
                writer.write_pages(0, 0, 1, filling(pages[0]))
        until(lambda: durable(stage.client, "early"), "it is durable")
        stage.client.free("early")
        for layer, raw in stage.stored("early").items():
            assert np.array_equal(raw, pages[layer])


def test_an_unnamed_one_is_found_by_its_tokens_in_its_own_key_space(stage):
    tokens = document_of(13, 6)
    stage.put(None, tokens)
    assert stage.store.lookup(NATIVE, [*tokens[: 5 * PAGE + 3], 1]).token_count == 5 * PAGE
    assert stage.store.lookup(SPEC, tokens).token_count == 0
