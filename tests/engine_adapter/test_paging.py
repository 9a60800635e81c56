"""Native extents into ranks' rows, and out of them: as canonical extents of the same KV, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from holdfast.engine_adapter.pages import FORMATS, key_value, native, page_format
from holdfast.engine_adapter.paging import Paging
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.layout import SCHEMES, copies, extent_holding, scheme, shard_holding
from holdfast.kvstore.spec import KVSpec, LayerGroup
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.staging import Staging
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS = 2
DTYPES = {"bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def specs(name, page_tokens, extent_pages, heads, dtype="bfloat16"):
    """A model's canonical spec, and its native one; key and value rows differ in length."""
    group = LayerGroup(layers=tuple(range(LAYERS)), kv_heads=heads, key_dim=4, value_dim=6)
    canonical = KVSpec(groups=(group,), dtype=dtype, model="m", vocabulary_size=9, block_tokens=8, extent_blocks=2)
    made = native(canonical, FORMATS[name](page_tokens, heads, 4, 6), accept="any")
    return canonical, replace(made, extent_blocks=extent_pages)


def made(spec, token_count):
    """Key and value [layers, heads, tokens, dim] as bits."""
    rng, group = np.random.default_rng(token_count), spec.groups[0]
    dtype = DTYPES[spec.dtype]
    shapes = [(LAYERS, group.kv_heads, token_count, dim) for dim in (group.key_dim, group.value_dim)]
    return [rng.integers(1, 1 << 14, shape).astype(dtype) for shape in shapes]


def native_extents(spec, kv, form):
    """Extents that hold this KV in pages of a format, and their holdings; written one element group at a time."""
    token_count, geometry = kv[0].shape[2], extent_geometry(spec)
    buffers, holdings = {}, []
    for number, start in enumerate(range(0, token_count, spec.extent_tokens)):
        stop = min(start + spec.extent_tokens, token_count)
        buffers[number] = np.zeros(geometry.size_bytes, np.uint8)
        holdings.append(extent_holding(number, start, stop - start, spec.groups[0].kv_heads))
        for layer in range(LAYERS):
            offset = geometry.plane_offset(layer, 0)
            raw = buffers[number][offset : offset + geometry.rows * geometry.row_bytes(0)].view(kv[0].dtype)
            views = key_value(form, raw.reshape(geometry.rows, -1))
            for token in range(start, stop):
                page, row = divmod(token - start, spec.block_tokens)
                for view, array in zip(views, kv, strict=True):
                    view[page, :, row] = array[layer, :, token]
    return buffers, holdings


def arena_of(spec, layout, rank, device):
    arena = HBMArena(spec, layout.length(rank // layout.tp) or 1, layout.tp)
    if device == "staged":
        arena.staging = Staging(torch.device("cpu"))
    return arena


def loaded(canonical, spec, buffers, holdings, layout, device="cpu"):
    """Every rank's arena, filled layer by layer from read-only native extents."""
    arenas = []
    for rank in range(layout.ranks):
        arena = arena_of(canonical, layout, rank, device)
        moves = list(copies(holdings, [shard_holding(layout, rank, canonical.groups[0].kv_heads)]))
        views = {number: memoryview(buffer).toreadonly() for number, buffer in buffers.items()}
        for layer in range(LAYERS):
            Paging(spec).load(arena, moves, views, layer)
        arenas.append(arena)
    return arenas


def rows_of(canonical, kv, layout, rank):
    """What a rank's rows must hold: its heads and tokens of the KV, in ascending order."""
    holding = shard_holding(layout, rank, canonical.groups[0].kv_heads)
    own = [token for span in holding.spans for token in range(span.start, span.stop)]
    return [array[:, holding.head_start : holding.head_stop, own] for array in kv]


def bits(tensor, dtype):
    return tensor.contiguous().view(torch.uint8).numpy().view(dtype)


cases = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(FORMATS)),
        "page_tokens": st.sampled_from([1, 5, 16, 24]),
        "extent_pages": st.sampled_from([1, 2, 4]),
        "heads": st.sampled_from([2, 4]),
        "pages": st.integers(1, 9),
        "scheme": st.sampled_from(sorted(SCHEMES)),
        "cp": st.integers(1, 3),
        "tp": st.sampled_from([1, 2]),
        "device": st.sampled_from(["cpu", "staged"]),
        "dtype": st.sampled_from(sorted(DTYPES)),
    }
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_pages_fill_the_rows_of_any_layout_and_are_filled_from_them(case):
    canonical, spec = specs(case["name"], case["page_tokens"], case["extent_pages"], case["heads"], case["dtype"])
    token_count = case["pages"] * case["page_tokens"]
    kv = made(canonical, token_count)
    buffers, holdings = native_extents(spec, kv, page_format(spec))
    layout = scheme(case["scheme"], token_count, case["cp"], case["tp"])
    arenas = loaded(canonical, spec, buffers, holdings, layout, case["device"])
    for rank, arena in enumerate(arenas):
        for ours, wanted in zip((arena.key, arena.value), rows_of(canonical, kv, layout, rank), strict=True):
            assert np.array_equal(bits(ours, wanted.dtype)[:, :, : wanted.shape[2]], wanted)
    again = {number: np.zeros_like(buffer) for number, buffer in buffers.items()}
    for rank, arena in enumerate(arenas):  # each writes its own tokens and heads, beside what others wrote
        moves = [move.reversed() for move in copies(holdings, [shard_holding(layout, rank, case["heads"])])]
        for layer in range(LAYERS):
            Paging(spec).save(arena, moves, {n: memoryview(b) for n, b in again.items()}, layer)
    for number, buffer in buffers.items():
        assert np.array_equal(again[number], buffer)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("stride", ["offset", "head", "token", "dim"])
def test_one_wrong_stride_shows(monkeypatch, part, stride):
    """The control: what equality above means."""
    canonical, spec = specs("vllm-cpu-vec/1", 16, 2, 2)
    kv = made(canonical, 64)
    buffers, holdings = native_extents(spec, kv, page_format(spec))
    right = page_format(spec)
    strides = getattr(right, part)
    less = {"offset": 1 if part == "key" else -1}.get(stride, -1)
    wrong = replace(right, **{part: replace(strides, **{stride: max(0, getattr(strides, stride) + less)})})
    monkeypatch.setattr("holdfast.engine_adapter.paging.page_format", lambda _: wrong)
    (arena,) = loaded(canonical, spec, buffers, holdings, scheme("contiguous", 64, 1))
    assert not np.array_equal(bits(getattr(arena, part), np.uint16), kv[part == "value"])
