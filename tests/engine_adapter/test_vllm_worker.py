"""The connector's worker side with a real daemon and page tensors of an engine that is not there."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from holdfast.engine_adapter.api import connect
from holdfast.engine_adapter.attachment import Attachment
from holdfast.engine_adapter.pages import key_value, page_format
from holdfast.engine_adapter.vllm.caches import Caches
from holdfast.engine_adapter.vllm.plans import Load, Plan, Save
from holdfast.engine_adapter.vllm.settings import Settings
from holdfast.engine_adapter.vllm.wishes import PinWish
from holdfast.engine_adapter.vllm.worker import WorkerSide
from holdfast.kvstore.errors import InvalidSpec
from vllm_cases import CANONICAL, PAGE, SPEC

from daemon_process import DaemonProcess, until

BLOCKS = 40
LAYERS = 3


@pytest.fixture(scope="module")
def daemon():
    sizes = {"ddr__slab_bytes": "16 MiB", "ddr__capacity_bytes": "64 MiB", "nvme__capacity_bytes": "64 MiB"}
    with DaemonProcess(**sizes, nvme__segment_bytes="16 MiB") as process:
        yield process.start()


@pytest.fixture(autouse=True)
def empty(daemon):
    yield
    with connect(daemon.socket) as store:
        store.unpin_all()
        for spec in (SPEC, CANONICAL):
            store.clear(spec)


def tensors(seed):
    """Pages that no others equal: [blocks, heads, tokens, key and value dims] by layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randint(-9999, 9999, (BLOCKS, 2, PAGE, 64), generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )
        for layer in range(LAYERS)
    }


class Worker:
    """A worker side, and the engine around it. `groups`: the KV cache group of each layer."""

    def __init__(self, socket, seed=0, groups=(0, 0, 0), whole=False, **settings):
        self.tensors = tensors(seed)
        self.before = {layer: tensor.clone() for layer, tensor in self.tensors.items()}
        caches = Caches(SPEC, {layer: (groups[layer], tensor) for layer, tensor in self.tensors.items()})
        self.side = WorkerSide(Settings(**settings), caches, lambda: connect(socket), whole=whole)
        self.ended = None
        self.loads = []
        self.saves = []
        self.sent = set()
        self.missing = {}
        self.failed = set()

    def step(self, **plan):
        """One step of the engine."""
        plan = Plan(**plan)
        self.side.take_back(plan)
        self.side.start_loads(plan)
        self.side.start_saves(plan)
        ended = self.side.ended()
        heard = self.side.heard()
        self.sent |= ended.sent
        self.missing |= ended.missing
        self.failed |= ended.failed
        if heard is not None:
            self.loads += heard.loads
            self.saves += heard.saves
        assert ended.received == ({one.request for one in heard.loads} if heard is not None else set())

    def connected(self):
        assert self.side._load_link.wait(10)
        assert self.side._save_link.wait(10)
        return self

    def save(self, tokens, blocks, **given):
        order = Save(request="s", tokens=tokens, extras={}, blocks=blocks, **given)
        self.step(saves=(order,))
        until(lambda: self.step() or self.saves, "it is saved")
        return self.saves.pop()

    def load(self, tokens, start, stop, blocks, **given):
        self.step(loads=(Load(request="l", tokens=tokens, extras={}, start=start, stop=stop, blocks=blocks, **given),))
        until(lambda: self.step() or self.loads, "it is loaded")
        return self.loads.pop()

    def unchanged(self, blocks=()):
        """Whether all blocks but these are what they were."""
        others = [block for block in range(BLOCKS) if block not in blocks]
        return all(same(self.tensors[layer][others], self.before[layer][others]) for layer in self.tensors)


def same(left, right):
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


@pytest.fixture
def engine(daemon):
    """Makes workers, and closes them."""
    made = []

    def make(socket=daemon.socket, **given):
        made.append(Worker(socket, **given))
        return made[-1]

    yield lambda **given: make(**given).connected()
    for worker in made:
        worker.side.close()


def prompt(pages, seed=0):
    return np.random.default_rng(seed).integers(0, 9999, pages * PAGE, dtype=np.uint32)


def test_a_load_waits_for_layers_no_longer_than_loads_may_take(engine, monkeypatch):
    """Its thread has others' loads to do."""
    worker, deadlines = engine(load_seconds=30.0), []
    layers = Attachment.layers

    def watched(attachment, *, deadline_seconds=600.0):
        deadlines.append(deadline_seconds)
        return layers(attachment, deadline_seconds=deadline_seconds)

    monkeypatch.setattr(Attachment, "layers", watched)
    tokens = np.arange(2 * PAGE, dtype=np.uint32)
    worker.save(tokens, ([3, 4],))
    assert worker.load(tokens, 0, 2 * PAGE, ([5, 6],)).problem is None
    assert all(0 < seconds <= 30 for seconds in deadlines)
    assert deadlines


def test_pages_come_back_in_another_engine_and_in_other_blocks(engine):
    tokens = prompt(10)
    writer, reader = engine(seed=1), engine(seed=2)
    source = [5, 6, 7, 20, 21, 3, 2, 1, 30, 31]
    assert writer.save(tokens, (source,)).problem is None
    target = [9, 8, 10, 11, 12, 38, 39, 4]
    loaded = reader.load(tokens, 2 * PAGE, 10 * PAGE, (target,))
    assert (loaded.stop, loaded.problem) == (10 * PAGE, None)
    assert loaded.receipt["outcome"] == "ready"
    assert loaded.receipt["exposed_ns"] > 0
    for layer in range(LAYERS):
        assert same(reader.tensors[layer][target], writer.tensors[layer][source[2:]])
    assert reader.unchanged(target)
    assert writer.unchanged()
    assert not reader.missing


def test_an_engine_with_nothing_to_compute_waits_for_what_it_loads_and_for_nothing_else(engine):
    tokens, worker = prompt(4), engine()
    worker.save(tokens, ([0, 1, 2, 3],))
    order = Load(request="l", tokens=tokens, extras={}, start=0, stop=4 * PAGE, blocks=([4, 5, 6, 7],))
    worker.side.start_loads(Plan(loads=(order,)))
    while not worker.side.ended(threading.TIMEOUT_MAX).received:  # what ended before may be news, too
        pass
    assert not worker.side.ended(threading.TIMEOUT_MAX).received


def test_a_prompt_that_begins_alike_is_loaded_as_far_as_it_does(engine):
    tokens, other = prompt(10), prompt(10, seed=1)
    worker = engine()
    worker.save(tokens, (list(range(10)),))
    mixed = np.concatenate([tokens[: 4 * PAGE + 5], other[4 * PAGE + 5 :]])
    loaded = worker.load(mixed, 0, 6 * PAGE, (list(range(20, 26)),))
    assert loaded.stop == 4 * PAGE
    assert "cache" in loaded.problem
    assert worker.missing == {"l": [24, 25]}
    assert worker.unchanged(range(20, 24))


def test_a_part_of_a_load_is_nothing_where_a_window_slides(engine):
    """Block 0 stands where the window has passed what was promised: of what came, its last tokens would look there."""
    tokens = prompt(6)
    worker = engine(whole=True)
    worker.save(tokens[: 5 * PAGE], (list(range(1, 6)),))
    loaded = worker.load(tokens, 0, 6 * PAGE, ([0, 0, 0, 0, 20, 21],))
    assert (loaded.stop, worker.failed, worker.missing) == (0, {"l"}, {})
    assert "cache" in loaded.problem
    assert worker.load(tokens, 0, 5 * PAGE, ([0, 0, 0, 0, 20],)).stop == 5 * PAGE
    assert worker.failed == {"l"}


def test_what_is_not_there_is_missing_and_nothing_is_written(engine):
    worker = engine()
    loaded = worker.load(prompt(5), 0, 5 * PAGE, ([7, 8, 9, 10, 11],))
    assert (loaded.stop, loaded.receipt) == (0, None)
    assert worker.missing == {"l": [7, 8, 9, 10, 11]}
    assert worker.unchanged()


def test_without_a_daemon_nothing_is_loaded_or_saved_and_nobody_waits(tmp_path):
    worker = Worker(tmp_path / "nobody.sock")
    try:
        assert "without the cache" in worker.load(prompt(2), 0, 2 * PAGE, ([1, 2],)).problem
        assert "without the cache" in worker.save(prompt(2), ([1, 2],)).problem
        assert worker.unchanged()
    finally:
        worker.side.close()


def test_layers_of_several_groups_have_tables_of_their_own(engine):
    """Block 0 stands where a sliding window has passed: nothing is written there."""
    tokens = prompt(3)
    writer, reader = engine(seed=1, groups=(0, 1, 0)), engine(seed=2, groups=(0, 1, 0))
    writer.save(tokens, ([1, 2, 3], [4, 5, 6]))
    reader.load(tokens, 0, 3 * PAGE, ([11, 12, 13], [0, 15, 16]))
    assert same(reader.tensors[0][[11, 12, 13]], writer.tensors[0][[1, 2, 3]])
    assert same(reader.tensors[1][[15, 16]], writer.tensors[1][[5, 6]])
    assert reader.unchanged([11, 12, 13, 15, 16])


def test_documents_in_canonical_form_become_pages(engine, daemon):
    """In pieces that are no whole pages."""
    tokens = prompt(7)[: 7 * PAGE - 3]
    rng = np.random.default_rng(0)
    made = {layer: rng.integers(0, 65536, (2, 2, len(tokens), 32), dtype=np.uint16) for layer in range(LAYERS)}
    with connect(daemon.socket) as store, store.ingest("report", CANONICAL, tokens) as writer:
        for layer, (key, value) in made.items():
            writer.write(layer, 0, key, value)
    worker = engine()
    target = [9, 3, 4, 5, 20]
    assert worker.load(tokens, PAGE, 6 * PAGE, (target,), canonical=True).stop == 6 * PAGE
    for layer, tensor in worker.tensors.items():
        pages = tensor[target].view(torch.int16).numpy().view(np.uint16).reshape(5, -1)
        for part, pieces in enumerate(key_value(page_format(SPEC), pages)):
            kept = made[layer][part][:, PAGE : 6 * PAGE].reshape(2, 5, PAGE, 32).transpose(1, 0, 2, 3)
            assert np.array_equal(pieces, kept)
    assert worker.unchanged(target)


def test_a_document_that_ends_within_a_page_is_stored_as_everybody_reads_it(engine, daemon):
    worker = engine()
    tokens = prompt(5)[: 4 * PAGE + 7]
    assert worker.save(tokens, ([9, 3, 4, 5, 20],), name="report", canonical=True).token_count == len(tokens)
    with connect(daemon.socket) as store, store.attach("report", spec=CANONICAL) as document:
        for layer in document.layers():
            pages = worker.tensors[layer.index][[9, 3, 4, 5, 20]].view(torch.int16).numpy().view(np.uint16)
            wanted = key_value(page_format(SPEC), pages.reshape(5, -1))
            for found, whole in zip(layer.gathered(), wanted, strict=True):
                assert np.array_equal(found, whole.transpose(1, 0, 2, 3).reshape(2, -1, 32)[:, : len(tokens)])
    assert worker.load(tokens, 0, 4 * PAGE, ([31, 32, 33, 34],), canonical=True).stop == 4 * PAGE
    assert same(worker.tensors[1][[31, 32, 33, 34]], worker.tensors[1][[9, 3, 4, 5]])


def test_a_named_document_is_pinned_and_what_is_wrong_with_the_pin_is_told(engine, daemon):
    worker = engine()
    saved = worker.save(prompt(4), ([1, 2, 3, 4],), name="report", pin=PinWish(tier="nvme", owner="me"))
    assert (saved.problem, saved.pin_problem, saved.token_count) == (None, None, 4 * PAGE)
    assert worker.save(prompt(2, 5), ([1, 2],), name="other", pin=PinWish(tier="moon")).pin_problem
    with connect(daemon.socket) as store:
        assert [(document.name, document.token_count) for document in store.documents()] == [
            ("other", 2 * PAGE),
            ("report", 4 * PAGE),
        ]
        assert [(pin.document, pin.owner) for pin in store.pins()] == [("report", "me")]


def test_a_name_that_has_other_tokens_is_refused(engine):
    worker = engine()
    worker.save(prompt(4), ([1, 2, 3, 4],), name="report")
    assert "report" in worker.save(prompt(4, 5), ([1, 2, 3, 4],), name="report").problem


@contextmanager
def stuck(worker):
    """Saves stop at their first page, until the end of this: of tokens that nobody stored, or there is none to read."""
    reached, free = threading.Event(), threading.Event()
    take = worker.side._caches.take

    def wait(*given):
        reached.set()
        assert free.wait(20)
        take(*given)

    worker.side._caches.take = wait
    try:
        yield reached, free
    finally:
        free.set()


def test_blocks_are_held_while_they_are_read_and_no_longer(engine):
    worker = engine()
    with stuck(worker) as (reached, free):
        worker.step(saves=(Save(request="s", tokens=prompt(4, seed=11), extras={}, blocks=([1, 2, 3, 4],)),))
        assert reached.wait(20)
        worker.step(held=("s",))
        worker.step()
        assert not worker.sent
        free.set()
        until(lambda: worker.step() or worker.sent, "its blocks are given back")
    until(lambda: worker.step() or worker.saves, "it is saved")
    assert worker.saves[0].problem is None


def test_blocks_of_a_save_that_is_over_are_given_back_at_once(engine):
    worker = engine()
    worker.save(prompt(4), ([1, 2, 3, 4],))
    worker.step(held=("s",))
    assert worker.sent == {"s"}


def test_blocks_that_are_taken_away_are_read_no_more_and_leave_no_document(engine, daemon):
    """Whoever takes them waits for the page that is being copied."""
    worker = engine()
    with stuck(worker) as (reached, free):
        worker.step(saves=(Save(request="s", tokens=prompt(4, seed=12), extras={}, blocks=([1, 2, 3, 4],), name="x"),))
        assert reached.wait(20)
        taken = threading.Thread(target=worker.step, kwargs={"stops": ("s",), "held": ("s",)})
        taken.start()
        taken.join(0.05)
        assert taken.is_alive()
        free.set()
        taken.join(20)
        assert worker.sent == {"s"}
    until(lambda: worker.step() or worker.saves, "it is told")
    assert "taken away" in worker.saves[0].problem
    with connect(daemon.socket) as store:
        assert not store.documents()


def test_a_save_that_takes_too_long_after_its_requests_end_is_given_up(engine):
    worker = engine(hold_seconds=1e-9)
    order = Save(request="s", tokens=prompt(4), extras={}, blocks=([1, 2, 3, 4],))
    worker.side._saves._threads = 0  # nobody ever begins
    worker.step(saves=(order,))
    worker.step(held=("s",))
    worker.step()
    assert worker.sent == {"s"}
    assert "request's end" in worker.saves[0].problem


def test_tensors_whose_pages_are_no_pieces_of_memory_are_refused():
    made = {layer: (0, tensor.transpose(0, 2)) for layer, tensor in tensors(0).items()}
    with pytest.raises(InvalidSpec, match="one piece"):
        Caches(SPEC, made)
    with pytest.raises(InvalidSpec, match="layers"):
        Caches(SPEC, {0: (0, tensors(0)[0])})
