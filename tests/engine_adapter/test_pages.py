"""Page formats: strides that cover a page exactly once, and documents that keep an engine's pages as they are."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.pages import FORMATS, PageFormat, Strides, key_value, native, page_format, undescribed
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import InvalidRequest, InvalidSpec, PartialPage, UnknownPageFormat
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.seal import seal_planes
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon_process import DaemonProcess, durable, until

PLAIN = LayerGroup(layers=(0, 2), kv_heads=2, key_dim=8, value_dim=4)
LATENT = LayerGroup(kind=GroupKind.MLA, layers=(1,), kv_heads=1, key_dim=24, value_dim=0)
CANONICAL = KVSpec(groups=(PLAIN, LATENT), dtype="bfloat16", model="m", vocabulary_size=9999, extent_blocks=1)
PAGE = 24  # tokens: no power of two
STEP = 4 * PAGE  # tokens an extent

shapes = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
formats = st.sampled_from(sorted(FORMATS))


def of_plain(name="vllm-cpu-vec/1", tokens=PAGE):
    return FORMATS[name](tokens, PLAIN.kv_heads, PLAIN.key_dim, PLAIN.value_dim)


def spec_of(page):
    return replace(native(CANONICAL, page, accept="any"), extent_blocks=4)


SPEC = spec_of(of_plain())


# Formats -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(formats, shapes)
def test_keys_and_values_cover_every_element_of_a_page_exactly_once(name, shape):
    made = FORMATS[name](*shape)
    page = np.arange(made.elements)[np.newaxis]
    key, value = key_value(made, page)
    tokens, heads, key_dim, value_dim = shape
    assert key.shape == (1, heads, tokens, key_dim)
    assert value.shape == (1, heads, tokens, value_dim)
    assert sorted([*key.ravel(), *value.ravel()]) == list(range(made.elements))


@settings(deadline=None)
@given(formats, shapes, st.integers(1, 6), st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]))
def test_what_is_written_through_the_views_is_read_back(name, shape, count, dtype):
    made = FORMATS[name](*shape)
    pages = np.zeros((count, 2, made.elements), dtype)[:, 1]  # strided, as in an engine's tensor of several layers
    views = key_value(made, pages)
    kept = [np.random.default_rng(1).integers(0, 200, view.shape).astype(dtype) for view in views]
    for view, array in zip(views, kept, strict=True):
        view[...] = array
    frozen = np.ascontiguousarray(pages)
    frozen.flags.writeable = False
    for view, array in zip(key_value(made, frozen), kept, strict=True):
        assert np.array_equal(view, array)
        assert not view.flags.writeable


def test_the_cpu_format_is_what_was_seen_in_vllm():
    """For each head the keys with a dim a row, then the values with a token a row (research/ENGINES.md, section 1)."""
    made = FORMATS["vllm-cpu-vec/1"](32, 2, 16, 16)
    page = np.arange(made.elements).reshape(1, -1)
    key, value = key_value(made, page)
    head = page[0].reshape(2, 2, -1)[1]
    assert np.array_equal(key[0, 1], head[0].reshape(16, 32).T)
    assert np.array_equal(value[0, 1], head[1].reshape(32, 16))


@pytest.mark.parametrize(("name", "order"), [("vllm-flash-nhd/1", (0, 2, 1, 3)), ("vllm-flash-hnd/1", (0, 1, 2, 3))])
def test_the_flash_formats_are_the_tensor_that_the_source_splits(name, order):
    """[pages, heads, tokens, key | value], in memory with tokens before heads (NHD) or as it is (HND)."""
    seen = np.arange(3 * 2 * 5 * 8).reshape(3, 2, 5, 8)
    key, value = key_value(FORMATS[name](5, 2, 4, 4), np.ascontiguousarray(seen.transpose(order)).reshape(3, -1))
    assert np.array_equal(key, seen[..., :4])
    assert np.array_equal(value, seen[..., 4:])


def test_a_native_spec_names_its_format_and_finds_it_again():
    made = native(CANONICAL, of_plain())
    assert made.page_format == "vllm-cpu-vec/1:tokens=24"
    assert made.block_tokens == PAGE
    assert page_format(made, 0) == of_plain()
    assert page_format(made, 1) == FORMATS["vllm-cpu-vec/1"](PAGE, 1, 24, 0)
    assert made.canonical() == CANONICAL.canonical()


@pytest.mark.parametrize("tag", ["", "?", "unknown/1:tokens=24", "vllm-cpu-vec/1:tokens=25", "vllm-cpu-vec/1"])
def test_an_unknown_format_is_told_what_to_do(tag):
    with pytest.raises(UnknownPageFormat, match=r"LayerKV\.pages"):
        page_format(replace(SPEC, page_format=tag), 0)


def test_a_format_of_another_shape_is_refused():
    with pytest.raises(InvalidSpec, match="heads"):
        native(CANONICAL, replace(of_plain(), heads=3))


def test_a_format_that_no_engine_confirmed_must_be_asked_for():
    with pytest.raises(UnknownPageFormat, match="accept"):
        native(CANONICAL, of_plain("vllm-flash-nhd/1"))


# Documents -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon():
    sizes = {"ddr__slab_bytes": "64 KiB", "ddr__capacity_bytes": "4 MiB", "nvme__capacity_bytes": "4 MiB"}
    with DaemonProcess(**sizes, nvme__segment_bytes="256 KiB") as process:
        yield process.start()


@pytest.fixture
def store(daemon):
    with Store(Client(daemon.socket)) as opened:
        yield opened
        for document in opened.documents():
            opened.delete(document.name)


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 9999, count)


def paged(spec, count, seed=0):
    """An engine's pages of that many tokens by layer: uint8 [pages, page bytes]."""
    rng = np.random.default_rng(seed)
    return {
        layer: rng.integers(0, 256, (100, spec.page_bytes(number)), np.uint8)[: count // spec.block_tokens]
        for number, group in enumerate(spec.groups)
        for layer in group.layers
    }


def raw_pages(layer, *tokens):
    """Pages as they were stored, [n, page bytes]: each piece goes on where the one before it ended."""
    pieces = layer.pages(*tokens)
    found = np.concatenate([view.reshape(-1, view.shape[-1]) for _, view in pieces])
    starts = np.cumsum([0, *(view.shape[0] * view.shape[1] for _, view in pieces)]) + pieces[0][0]
    assert [first for first, _ in pieces] == starts[:-1].tolist()
    return found


def decoded(spec, pages, layer):
    """Key and value [heads, tokens, dim] of these pages, by the format's strides, element by element."""
    number = 0 if layer in PLAIN.layers else 1
    made = page_format(spec, number)
    arrays = []
    for strides, dim in ((made.key, made.key_dim), (made.value, made.value_dim)):
        at = np.ix_(range(made.heads), range(made.tokens), range(dim))
        where = strides.offset + at[0] * strides.head + at[1] * strides.token + at[2] * strides.dim
        some = pages[layer].view(np.uint16)[:, where.ravel()].reshape(len(pages[layer]), *where.shape)
        arrays.append(some.transpose(1, 0, 2, 3).reshape(made.heads, len(some) * made.tokens, dim))
    return arrays


def filling(pages):
    def fill(first, view):
        view[...] = pages[first : first + len(view)]

    return fill


def ingest(store, name, spec, pages, pieces, seed=0):
    """Write every layer's pages in these pieces, in their order."""
    count = len(pages[0]) * spec.block_tokens
    with store.ingest(name, spec, tokens(count, seed), write_policy=WritePolicy.THROUGH) as writer:
        for layer, own in pages.items():
            for first, stop in pieces:
                writer.write_pages(layer, first, stop - first, filling(own))


PIECES = {
    "whole": [(0, 22)],
    "singly": [(page, page + 1) for page in range(22)],
    "askew": [(first, min(first + 5, 22)) for first in range(0, 22, 5)],
    "backwards": [(first, min(first + 3, 22)) for first in reversed(range(0, 22, 3))],
    "twice": [(0, 22), (3, 9), (0, 4)],
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_pages_come_back_as_they_were_and_decoded_also_from_nvme(daemon, store, name, pieces):
    spec = spec_of(of_plain(name))
    pages = paged(spec, 22 * PAGE)
    ingest(store, "a", spec, pages, pieces)
    with closing(Client(daemon.socket)) as client:
        until(lambda: durable(client, "a"), "it is durable")
    store.free("a")
    with store.attach("a", spec=spec) as document:
        for layer in document.layers():
            assert np.array_equal(raw_pages(layer), pages[layer.index])
            assert not layer.pages()[0][1].flags.writeable
            for start, stop in ((0, 1), (PAGE - 1, PAGE + 1), (3 * PAGE, 9 * PAGE), (5 * PAGE + 3, 500 * PAGE)):
                wanted = pages[layer.index][start // PAGE : -(-stop // PAGE)]
                assert np.array_equal(raw_pages(layer, start, stop), wanted)
            key, value = decoded(spec, pages, layer.index)
            for ours, theirs in zip(layer.gathered(), (key, value), strict=True):
                assert np.array_equal(ours, theirs)
            assert [piece.start for piece in layer.pieces] == list(range(0, 22 * PAGE, STEP))
            assert np.array_equal(np.concatenate([piece.key for piece in layer.pieces], axis=1), key)
            assert np.array_equal(np.concatenate([piece.value for piece in layer.pieces], axis=1), value)


@pytest.mark.parametrize("wanted", [(0, 1), (5, 20), (20, 30), (STEP - 1, STEP + 1), (7, 22 * PAGE - 3), (PAGE, 400)])
def test_any_range_of_tokens_is_decoded_whole_and_in_windows(store, wanted):
    pages = paged(SPEC, 22 * PAGE)
    ingest(store, "a", SPEC, pages, PIECES["whole"])
    start, stop = wanted
    with store.attach("a", tokens=wanted) as document:
        for layer in document.layers():
            for ours, theirs in zip(layer.gathered(), decoded(SPEC, pages, layer.index), strict=True):
                assert np.array_equal(ours, theirs[:, start:stop])
            first = layer.pages()[0][0]
            raw = raw_pages(layer)
            assert (first, first + len(raw)) == (start // PAGE, -(-stop // PAGE))
            assert np.array_equal(raw, pages[layer.index][first : first + len(raw)])
    windows = store.windows("a", tokens=wanted, window_tokens=77)
    seen = [[layer.gathered()[0] for layer in window.layers()] for window in windows]
    for layer, parts in zip((0, 1, 2), zip(*seen, strict=True), strict=True):
        assert np.array_equal(np.concatenate(parts, axis=1), decoded(SPEC, pages, layer)[0][:, start:stop])


def test_a_wrong_stride_shows(store):
    """The control: by another format's strides the same pages are other keys and values."""
    pages = paged(SPEC, 4 * PAGE)
    other = replace(SPEC, page_format=of_plain("vllm-flash-hnd/1").tag)
    for ours, theirs in zip(decoded(SPEC, pages, 0), decoded(other, pages, 0), strict=True):
        assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize("pieces", [[(0, 22 * PAGE)], [(0, 5), (5, 100), (100, 101), (101, 22 * PAGE)]], ids=len)
def test_keys_and_values_are_encoded_into_pages(store, pieces):
    """What an engine finds in its pages is what another one wrote as arrays."""
    pages = paged(SPEC, 22 * PAGE)
    with store.ingest("a", SPEC, tokens(22 * PAGE)) as writer:
        for layer in pages:
            key, value = decoded(SPEC, pages, layer)
            for start, stop in pieces:
                writer.write(layer, start, key[:, start:stop], value[:, start:stop])
    with store.attach("a") as document:
        for layer in document.layers():
            assert np.array_equal(raw_pages(layer), pages[layer.index])


def test_the_writers_seals_are_the_daemons(store):
    with store.ingest("a", SPEC, tokens(3 * PAGE, 3)) as writer:
        pages = paged(SPEC, 3 * PAGE)
        for layer, own in pages.items():
            writer.write_pages(layer, 0, 3, filling(own))
        made = writer.seals()
        opened = writer._targets
        assert made == [
            seal_planes(target.planes.content, extent_geometry(SPEC, number)) for number, target in enumerate(opened)
        ]


def test_a_shared_front_is_neither_asked_for_nor_written(store):
    pages = paged(SPEC, 10 * PAGE)
    with store.ingest("a", SPEC, tokens(8 * PAGE)) as writer:
        for layer, own in pages.items():
            writer.write_pages(layer, 0, 8, filling(own))
    asked = []
    with store.ingest("b", SPEC, tokens(10 * PAGE)) as writer:
        assert writer.cached_tokens == 8 * PAGE
        for layer, own in pages.items():

            def fill(first, view, own=own):
                asked.append(first)
                filling(own)(first, view)

            writer.write_pages(layer, 0, 10, fill)
    assert asked == [8, 8, 8]
    with store.attach("b") as document:
        for layer in document.layers():
            assert np.array_equal(raw_pages(layer), pages[layer.index])


def test_misuse_is_refused(store):
    with pytest.raises(PartialPage, match=f"store the first {PAGE}"), store.ingest("a", SPEC, tokens(PAGE + 1)):
        pass
    with pytest.raises(InvalidRequest, match="never written"), store.ingest("a", SPEC, tokens(2 * PAGE)) as writer:
        writer.write_pages(0, 0, 2, lambda _, view: view.fill(0))
    for wrong, match in (((9, 0, 1), "layer 9"), ((0, 1, 2), "not in this document"), ((0, -1, 1), "not in this")):
        with pytest.raises(InvalidRequest, match=match), store.ingest("a", SPEC, tokens(2 * PAGE)) as writer:
            writer.write_pages(*wrong, filling([]))
    with pytest.raises(InvalidRequest, match="canonical"), store.ingest("a", CANONICAL, tokens(9)) as writer:
        writer.write_pages(0, 0, 1, filling([]))
    with pytest.raises(ZeroDivisionError), store.ingest("a", SPEC, tokens(PAGE)) as writer:
        writer.write_pages(0, 0, 1, lambda *_: 1 / 0)
    assert store.documents() == []
    with store.ingest("a", CANONICAL, tokens(4)) as writer:
        for group in CANONICAL.groups:
            for layer in group.layers:
                key, value = (np.zeros((group.kv_heads, 4, dim), np.uint16) for dim in (group.key_dim, group.value_dim))
                writer.write(layer, 0, key, value)
    with store.attach("a") as document, pytest.raises(InvalidRequest, match="canonical"):
        next(iter(document.layers())).pages()


def test_views_tell_the_format_and_native_keys_are_their_own(store):
    pages = paged(SPEC, 4 * PAGE)
    ingest(store, "a", SPEC, pages, [(0, 4)])
    assert store.document("a").page_format == "vllm-cpu-vec/1:tokens=24"
    assert store.lookup(SPEC, tokens(4 * PAGE + 5)).token_count == 4 * PAGE
    assert store.lookup(CANONICAL, tokens(4 * PAGE)).token_count == 0
    assert store.lookup(spec_of(of_plain(tokens=PAGE // 2)), tokens(4 * PAGE)).token_count == 0


def test_an_unknown_format_is_stored_and_given_out_raw(store):
    """The daemon knows sizes only: pages of an engine that came later than this release are safe with it."""
    spec = replace(undescribed(CANONICAL, "later/7", PAGE), extent_blocks=4)
    pages = paged(spec, 5 * PAGE)
    ingest(store, "a", spec, pages, [(0, 5)])
    with store.attach("a") as document:
        for layer in document.layers():
            assert np.array_equal(raw_pages(layer), pages[layer.index])
            with pytest.raises(UnknownPageFormat):
                layer.gathered()


def test_strides_are_values():
    assert isinstance(hash(of_plain()), int)
    assert isinstance(of_plain(), PageFormat)
    assert of_plain().key == Strides(offset=0, head=PAGE * 12, token=1, dim=PAGE)
