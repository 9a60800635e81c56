"""Transformers: what is reused changes neither tokens nor logits, whatever fails; unlike models share nothing.

Bounds on logits, whose largest is about 4: a prompt that is prefilled in two parts adds in another order. Continuing
with the very same KV is held to equal bits.
"""

import copy
import logging
import os
import re
from contextlib import closing, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from driver_process import group
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.attachment import Attachment
from holdfast.engine_adapter.pages import native, vllm_cpu_vec
from holdfast.engine_adapter.session import Session
from holdfast.engine_adapter.transformers import HoldfastCache, attach, cached, reuse, save
from holdfast.engine_adapter.transformers.cache import as_array, refuse_unknown_layers
from holdfast.engine_adapter.writer import IngestWriter
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    CorruptExtent,
    DaemonUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    SpecMismatch,
)
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import write_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, T5Config

from daemon_process import DaemonProcess, until

CONFIG = ModelConfig(
    vocabulary_size=96, hidden_size=64, intermediate_size=112, layers=3, heads=4, kv_heads=2, head_dim=16
)
KINDS = {
    "llama": CONFIG,
    "qwen3-bfloat16": replace(CONFIG, architecture="Qwen3ForCausalLM", dtype="bfloat16"),
    "mistral-window": replace(CONFIG, architecture="MistralForCausalLM", window=24),
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.05}
SIZES = {
    "ddr__slab_bytes": "8 MiB",
    "ddr__capacity_bytes": "64 MiB",
    "nvme__capacity_bytes": "128 MiB",
    "nvme__segment_bytes": "8 MiB",
}
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, config in KINDS.items():
        write_checkpoint(found[kind], config)
    return found


@pytest.fixture(scope="module")
def models(directories):
    return {kind: AutoModelForCausalLM.from_pretrained(directory) for kind, directory in directories.items()}


@pytest.fixture(params=KINDS)
def model(request, models):
    return models[request.param]


@pytest.fixture
def llama(models):
    return models["llama"]


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**SIZES) as process:
        yield process.start()


@pytest.fixture
def tenant(request):
    """What one test stores, named or not, no other finds."""
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def store(daemon, tenant):
    with Store(Client(daemon.socket, tenant)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def untold():
    reuse._told.clear()


def prompt(count, seed=0):
    return torch.randint(0, CONFIG.vocabulary_size, (1, count), generator=torch.Generator().manual_seed(seed))


def answer(model, ids, cache=None):
    """Greedy tokens, and their logits."""
    given = {} if cache is None else {"past_key_values": cache}
    told = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, **told, **given)
    return found.sequences[0, ids.shape[1] :].tolist(), torch.cat(found.logits)


def check(model, ids, cache, expected=None):
    tokens, logits = answer(model, ids, cache)
    expected_tokens, expected_logits = expected or answer(model, ids)
    assert tokens == expected_tokens
    assert (logits - expected_logits).abs().max() <= BOUNDS[model.dtype]


def saved(store, model, ids, name=None):
    """Prefill and save; returns the cache that was saved."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert save(store, model, ids, cache, name=name, write_policy=WritePolicy.THROUGH) == ids.shape[1]
    return cache


# Reuse -----------------------------------------------------------------------------------------


def test_a_prompt_is_read_the_second_time(store, model):
    """Whole, all but one token; by one that goes on elsewhere, in whole blocks."""
    ids = prompt(300)
    for reused in (0, 299):
        with cached(store, model, ids) as cache:
            assert cache.reused_tokens == reused
            check(model, ids, cache)
    other = torch.cat([ids[:, :200], prompt(70, seed=1)], dim=1)
    with cached(store, model, other) as cache:
        assert cache.reused_tokens == 192
        check(model, other, cache)
    with cached(store, model, other) as cache:
        assert cache.reused_tokens == 269


def test_a_named_document_is_found_to_its_last_token(store, model):
    """And only if the prompt begins with it."""
    ids, question = prompt(100), prompt(9, seed=1)
    saved(store, model, ids, "report")
    asked = torch.cat([ids, question], dim=1)
    with attach(store, model, asked, name="report") as cache:
        assert cache.reused_tokens == 100
        check(model, asked, cache)
    with attach(store, model, asked) as cache:
        assert cache.reused_tokens == 64
        check(model, asked, cache)
    for given, name, reused in ((question, "report", 0), (asked, "nothing", 64), (ids[:, :90], "report", 64)):
        with attach(store, model, given, name=name) as cache:
            assert cache.reused_tokens == reused
            check(model, given, cache)


def test_continuing_is_continuing_with_the_same_bits(store, model):
    """The oracle is Transformers' own cache, cut to what is reused."""
    ids = prompt(200)
    theirs = saved(store, model, ids)
    theirs.crop(-(200 - 192))
    ids = torch.cat([ids[:, :192], prompt(20, seed=1)], dim=1)
    expected_tokens, expected_logits = answer(model, ids, theirs)
    with attach(store, model, ids) as cache:
        assert cache.reused_tokens == 192
        tokens, logits = answer(model, ids, cache)
    assert tokens == expected_tokens
    assert torch.equal(logits, expected_logits)


def test_layers_are_read_when_they_are_touched_and_then_the_lease_is_given_back(
    daemon, store, llama, monkeypatch, small_extents
):
    """Layer by layer, in the model's order; of several extents."""
    ids, events = prompt(300), []
    saved(store, llama, ids)
    cache = attach(store, llama, ids)
    inner = cache._attached.fill
    monkeypatch.setattr(cache._attached, "fill", lambda at, *into: (events.append(f"read {at}"), inner(at, *into)))
    hooks = [
        layer.register_forward_pre_hook(lambda *_, at=at: events.append(f"layer {at}"))
        for at, layer in enumerate(llama.model.layers)
    ]
    assert len(daemon.leases()) == 1
    check(llama, ids, cache, answer(llama, ids))
    for hook in hooks:
        hook.remove()
    del events[: events.index("read 0") - 1]  # those of the answer to compare with
    assert events[:6] == ["layer 0", "read 0", "layer 1", "read 1", "layer 2", "read 2"]
    assert not any(event.startswith("read") for event in events[6:])
    assert daemon.leases() == []


@pytest.fixture
def small_extents(monkeypatch, llama):
    spec = replace(reuse.spec_of_model(llama), extent_blocks=1)
    monkeypatch.setattr(reuse, "spec_of_model", lambda _: spec)


def test_one_wrong_layer_shows(store, llama):
    """The control: reuse is no decoration, and equality of tokens proves something."""
    ids = prompt(200)
    cache = DynamicCache()
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    cache.layers[1].values = cache.layers[1].values.flip(2)
    save(store, llama, ids, cache)
    with attach(store, llama, ids) as wrong:
        assert wrong.reused_tokens == 199
        tokens, logits = answer(llama, ids, wrong)
    expected_tokens, expected_logits = answer(llama, ids)
    assert tokens != expected_tokens
    assert (logits - expected_logits).abs().max() > 1000 * BOUNDS[torch.float32]


def test_a_document_of_the_runner_is_read_and_the_runner_reads_ours(daemon, directories, llama):
    """One checkpoint, one key space; the runner prefills in chunks, so logits differ in the last bits."""
    theirs, ours, question = prompt(150, seed=2), prompt(150, seed=3), prompt(7, seed=4)
    with (
        closing(Client(daemon.socket)) as client,
        Store(Client(daemon.socket)) as store,  # of the tenant that the group has
        group(directories["llama"], "runner", 1, daemon.socket, 1000) as engine,
    ):
        session = Session(client, engine)
        session.ingest("theirs", theirs[0].tolist(), chunk_tokens=64)
        saved(store, llama, ours, "ours")
        for ids, name in ((theirs, "theirs"), (ours, "ours")):
            asked = torch.cat([ids, question], dim=1)
            expected = answer(llama, asked)
            with attach(store, llama, asked, name=name) as cache:
                assert cache.reused_tokens == 150
                check(llama, asked, cache, expected)
            reply = session.ask(name, question[0].tolist(), NEW)
            assert list(reply.answer.tokens) == expected[0]
            assert abs(reply.answer.logits - expected[1].numpy()).max() < 1e-4


def test_what_vllm_keeps_in_pages_is_read_by_name_or_by_tokens(store, model):
    """A native document, in whole pages, made of Transformers' own KV; decoded on the way."""
    ids, page_tokens = prompt(200), 32
    kv = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=kv)
    canonical = reuse.spec_of_model(model)
    shape = canonical.groups[0]
    page_format = vllm_cpu_vec(page_tokens, shape.kv_heads, shape.key_dim, shape.value_dim)
    with store.ingest("pages", native(canonical, page_format), ids[0, :192].numpy()) as writer:
        for at, layer in enumerate(kv.layers):
            writer.write(at, 0, *(as_array(states[0, :, :192]) for states in (layer.keys, layer.values)))
    for formats, name, reused in (((), None, 0), ((), "pages", 192), ((page_format,), None, 192)):
        with attach(store, model, ids, name=name, page_formats=formats) as cache:
            assert cache.reused_tokens == reused
            check(model, ids, cache)
    with attach(store, model, ids[:, :192], name="pages") as cache:
        assert cache.reused_tokens == 191
        check(model, ids[:, :192], cache)


# Saving ----------------------------------------------------------------------------------------


def test_only_what_the_store_lacks_is_copied(store, llama, monkeypatch, small_extents):
    ids, written, inner = prompt(300), [], IngestWriter.write
    monkeypatch.setattr(
        IngestWriter,
        "write",
        lambda self, layer, start, key, value: (
            written.append((layer, start, key.shape[1])),
            inner(self, layer, start, key, value),
        ),
    )
    cache = saved(store, llama, ids)
    assert sorted(start for layer, start, _ in written if layer == 0) == [0, 64, 128, 192, 256]
    written.clear()
    assert save(store, llama, ids[:, :128], cache) == 128
    assert save(store, llama, ids[:, :192], cache, name="front") == 192
    assert written == []
    longer = torch.cat([ids[:, :128], prompt(100, seed=1)], dim=1)
    with cached(store, llama, longer) as cache:
        answer(llama, longer, cache)
    assert sorted(start for layer, start, _ in written if layer == 0) == [128, 192]


def test_the_answer_is_stored_as_far_as_it_has_kv(store, llama):
    """`generate` never computes the last token's."""
    ids = prompt(100)
    cache = attach(store, llama, ids)
    tokens, _ = answer(llama, ids, cache)
    whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
    assert save(store, llama, whole, cache, name="chat") == 100 + NEW - 1
    asked = torch.cat([whole, prompt(5, seed=1)], dim=1)
    with attach(store, llama, asked, name="chat") as cache:
        assert cache.reused_tokens == 100 + NEW - 1
        check(llama, asked, cache)


def test_what_cannot_be_right_is_refused(store, llama, models):
    ids, cache = prompt(100), DynamicCache()
    with pytest.raises(InvalidRequest, match="0 layers"):
        save(store, llama, ids, cache)
    batch = prompt(40).reshape(2, 20)
    with pytest.raises(InvalidRequest, match=r"one sequence.*\(2, 20\)"):
        attach(store, llama, batch)
    with torch.no_grad():
        llama(batch, past_key_values=cache)
    with pytest.raises(InvalidRequest, match="batch of 2"):
        save(store, llama, batch[:1], cache)
    saved(store, llama, ids)
    with attach(store, llama, ids) as cache:
        with pytest.raises(InvalidRequest, match="batch of 2"):
            llama.generate(ids.repeat(2, 1), past_key_values=cache, max_new_tokens=2)
        with pytest.raises(InvalidRequest, match="layer 0 of the cache is empty"):
            save(store, llama, ids[:, :90], cache)
        with pytest.raises(InvalidRequest, match="other tokens"):
            save(store, llama, prompt(100, seed=1), cache)
    mistral = models["mistral-window"]
    window = DynamicCache(config=mistral.config)
    with torch.no_grad():
        mistral(ids, past_key_values=window)
    with pytest.raises(InvalidRequest, match="only the last 23 of 100"):
        save(store, mistral, ids, window)
    kinds = ["full_attention", "linear_attention"]
    linear = SimpleNamespace(config=Qwen3Config(num_hidden_layers=2, layer_types=kinds))
    virtual = SimpleNamespace(config=llama.config, active_peft_config=SimpleNamespace(is_prompt_learning=True))
    for other, match in (
        (linear, "LinearAttentionLayer"),
        (SimpleNamespace(config=T5Config()), "encoder"),
        (virtual, "virtual"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            refuse_unknown_layers(other)
    with attach(store, llama, ids) as cache, pytest.raises(InvalidRequest, match="attach once more"):
        copy.deepcopy(cache)
    with pytest.raises(ValueError, match="retry"):
        attach(store, llama, ids, trouble="retry")
    assert len([view for view in store.documents() if view.complete]) == len(store.documents())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_the_length_of_a_prompt_are_refused(kind, nested):
    """The front of a long prompt has other KV than a short prompt of the same tokens."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else {}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    if nested:
        config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(InvalidRequest, match=kind):
        refuse_unknown_layers(SimpleNamespace(config=config))


def test_padding_is_refused_because_it_moves_what_stands_behind_it(store, llama, monkeypatch):
    """A `generate` that is given no mask makes one, of the padding token."""
    ids = prompt(100)
    plain = saved(store, llama, ids)
    monkeypatch.setattr(llama.generation_config, "pad_token_id", int(ids[0, 50]))
    monkeypatch.setattr(llama.generation_config, "eos_token_id", None)
    made = DynamicCache()
    llama.generate(ids, past_key_values=made, max_new_tokens=1)
    assert not torch.equal(made.layers[0].keys, plain.layers[0].keys)
    for use in (lambda: attach(store, llama, ids), lambda: save(store, llama, ids, made)):
        with pytest.raises(InvalidRequest, match="without padding"):
            use()
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [1, int(ids[0, 50])])  # nobody masks it then
    with attach(store, llama, ids) as cache:
        check(llama, ids, cache)


def test_pictures_are_told_apart_by_extras_and_refused_without(store, llama, monkeypatch):
    """Equal placeholders are no equal pictures."""
    ids, one, other = prompt(200), {1: b"one"}, {1: b"other"}
    monkeypatch.setattr(llama.config, "image_token_id", int(ids[0, 100]), raising=False)
    with pytest.raises(InvalidRequest, match="image_token_id"):
        attach(store, llama, ids)
    with pytest.raises(InvalidRequest, match="image_token_id"):
        save(store, llama, ids, DynamicCache())
    for extras, reused in ((one, 0), (one, 199), (other, 64), (other, 199)):
        with cached(store, llama, ids, extras=extras) as cache:
            assert cache.reused_tokens == reused
            check(llama, ids, cache)


def test_another_models_document_is_refused(store, llama, models):
    ids = prompt(100)
    saved(store, models["mistral-window"], ids, "theirs")
    with pytest.raises(SpecMismatch, match="theirs"):
        attach(store, llama, ids, name="theirs")
    with attach(store, llama, ids) as cache:
        assert cache.reused_tokens == 0


def test_the_cache_is_a_cache(store, llama):
    """Crop and reset before and after it was touched; layers out of order."""
    ids = prompt(128)
    saved(store, llama, ids)
    with attach(store, llama, ids) as cache:
        assert isinstance(cache, HoldfastCache)
        assert cache.get_seq_length() == 127
        cache.crop(-7)
        assert cache.get_seq_length() == 120
        with pytest.raises(InvalidRequest):
            cache.crop(5)
        check(llama, ids, cache)
        cache.crop(-(cache.get_seq_length() - 100))
        check(llama, ids, cache)
    with attach(store, llama, ids) as cache:
        cache.reset()
        assert cache.get_seq_length() == 0
        check(llama, ids, cache)
    with attach(store, llama, ids) as cache, attach(store, llama, ids) as straight:
        row = torch.zeros(1, 2, 1, 16)
        backwards = {at: cache.update(row, row, at) for at in (2, 0, 1)}
        for at in (0, 1, 2):
            for one, other in zip(backwards[at], straight.update(row, row, at), strict=True):
                assert torch.equal(one, other)


# Failures --------------------------------------------------------------------------------------


def flipped(daemon):
    """Change a byte in every 4 KiB that is on NVMe."""
    for path in (daemon.data_dir / "nvme").glob("segment-*"):
        with path.open("r+b") as file:
            for offset in range(0, path.stat().st_size, 4096):
                byte = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), offset)
            os.fsync(file.fileno())


def on_nvme(store, llama, ids, name):
    saved(store, llama, ids, name)
    until(lambda: store.document(name).durable, "it is durable")
    store.free(name)


def test_from_nvme_and_what_is_corrupt_there_is_computed(store, daemon, llama, caplog):
    """And stored again: the next prompt is read."""
    ids = prompt(200, seed=5)
    on_nvme(store, llama, ids, "report")
    with attach(store, llama, ids, name="report") as cache:
        assert cache.reused_tokens == 199
        check(llama, ids, cache)
    store.free("report")
    flipped(daemon)
    with caplog.at_level(logging.WARNING, "holdfast"), cached(store, llama, ids, name="report") as cache:
        check(llama, ids, cache)
    assert [record.name for record in caplog.records] == ["holdfast"]
    with attach(store, llama, ids, name="report") as cache:
        assert cache.reused_tokens == 199
        check(llama, ids, cache)


def test_who_asks_for_it_is_told(store, daemon, llama):
    ids = prompt(200, seed=6)
    on_nvme(store, llama, ids, "report")
    flipped(daemon)
    with attach(store, llama, ids, trouble="raise") as cache, pytest.raises(CorruptExtent):
        answer(llama, ids, cache)
    assert daemon.leases() == []
    with attach(store, llama, ids, name="nothing", trouble="raise") as cache:
        assert cache.reused_tokens == 0


def test_without_its_daemon_a_model_computes(llama, caplog):
    ids = prompt(200)
    expected = answer(llama, ids)
    with DaemonProcess(**SIZES) as daemon, Store(Client(daemon.start().socket)) as store:
        saved(store, llama, ids)
        with attach(store, llama, ids) as cache:
            daemon.kill()
            check(llama, ids, cache, expected)
        with caplog.at_level(logging.WARNING, "holdfast"):
            for _ in range(3):
                with cached(store, llama, ids) as cache:
                    assert cache.reused_tokens == 0
                    check(llama, ids, cache, expected)
        assert len(caplog.records) == 1
        with pytest.raises(DaemonUnavailable):
            attach(store, llama, ids, trouble="raise")
        with pytest.raises(DaemonUnavailable):
            saved(store, llama, ids)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_layers_that_cannot_be_read_are_computed_in_the_middle_of_the_forward_pass(store, model, broken, monkeypatch):
    """Those read so far stay right."""
    ids, inner = prompt(200), Attachment.layers

    def layers(attachment, *, deadline_seconds):
        for layer in inner(attachment, deadline_seconds=deadline_seconds):
            if layer.index == broken:
                raise CorruptExtent("planted")
            yield layer

    saved(store, model, ids)
    monkeypatch.setattr(Attachment, "layers", layers)
    with cached(store, model, ids) as cache:
        assert cache.reused_tokens == 199
        check(model, ids, cache)


def test_a_layer_that_takes_too_long_is_computed(store, llama, monkeypatch):
    ids, waits = prompt(200), []

    def waited(client, lease, layers, deadline_seconds):
        waits.append(deadline_seconds)
        raise DeadlineExceeded("planted")

    saved(store, llama, ids)
    with attach(store, llama, ids, deadline_seconds=7.0) as cache:
        monkeypatch.setattr(Client, "wait_layers", waited)
        check(llama, ids, cache)
    assert waits == [7.0]


def test_layers_that_were_not_read_before_the_end_are_computed(store, llama):
    ids = prompt(200)
    saved(store, llama, ids)
    with attach(store, llama, ids) as cache:
        pass
    check(llama, ids, cache)


def test_an_error_in_the_block_stores_nothing(store, llama):
    ids = prompt(100)
    with suppress(ZeroDivisionError), cached(store, llama, ids, name="broken") as cache:
        answer(llama, ids, cache)
        _ = 1 / 0
    with cached(store, llama, ids, name="untouched"):
        pass
    assert store.documents() == []
