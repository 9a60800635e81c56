from dataclasses import replace

import numpy as np
import pytest
import torch
from holdfast.kvstore.errors import InvalidSpec
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.layout import Span, copies, scheme, shard_holding
from holdfast.kvstore.spec import GroupKind
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.staging import Staging
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_helpers import extents_for, loaded, saved, tiny_model

MODEL = tiny_model()


def filled(layout, dtype="float32"):
    """One arena per rank whose rows hold numbers that name (part, layer, head, token)."""
    spec = replace(MODEL.spec, dtype=dtype)
    arenas = []
    for rank in range(layout.cp):
        arena = HBMArena(spec, layout.length(rank))
        for span in layout.spans(rank):
            tokens = torch.arange(span.start, span.stop, dtype=torch.float32)
            for layer in range(2):
                for head in range(2):
                    rows = slice(span.row, span.row + tokens.numel())
                    arena.key[layer, head, rows] = (tokens + 1000 * head + 4000 * layer)[:, None].to(arena.key.dtype)
                    arena.value[layer, head, rows] = -arena.key[layer, head, rows]
        arenas.append(arena)
    return arenas


@given(
    st.integers(1, 70),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_rows_survive_the_way_through_extents(count, first, second, cp, other_cp):
    """Saved under one layout and loaded under another, every row is where the other layout says."""
    source, target = scheme(first, count, cp), scheme(second, count, other_cp)
    buffers, holdings = saved(MODEL, filled(source), source)
    for arena, expected in zip(loaded(MODEL, buffers, holdings, target), filled(target), strict=True):
        assert torch.equal(arena.key, expected.key)
        assert torch.equal(arena.value, expected.value)


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("staged", ["load", "save", "both"])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # extents are read-only here
def test_the_way_of_a_gpu_moves_the_same_bytes(name, staged, monkeypatch):
    """Staged on the CPU device: what a GPU does, without its stream and its pinned memory."""
    layout, other = scheme(name, 70, 2), scheme("contiguous", 70, 3)
    made = HBMArena.__init__
    straight = {"load": HBMArena.load, "save": HBMArena.save}

    def stage(arena, *arguments, **options):
        made(arena, *arguments, **options)
        arena.staging = Staging(arena.device)

    monkeypatch.setattr(HBMArena, "__init__", stage)
    for way in {"load", "save"} - {staged} if staged != "both" else ():

        def unstaged(arena, *arguments, way=way):
            arena.staging, kept = None, arena.staging
            straight[way](arena, *arguments)
            arena.staging = kept

        monkeypatch.setattr(HBMArena, way, unstaged)
    buffers, holdings = saved(MODEL, filled(layout), layout)
    for arena, expected in zip(loaded(MODEL, buffers, holdings, other), filled(other), strict=True):
        assert arena.staging is not None
        assert torch.equal(arena.key, expected.key)
        assert torch.equal(arena.value, expected.value)


def test_extents_are_canonical():
    """Row (layer, part, head, token) of a saved extent lies where the geometry says."""
    layout = scheme("zigzag", 40, 2)
    buffers, holdings = saved(MODEL, filled(layout), layout)
    extent = extent_geometry(MODEL.spec)
    second = holdings[1]
    row = buffers[second.buffer][extent.offset(1, 1, 1, 3) :][:64].view(np.float32)
    token = second.spans[0].start + 3
    assert (row == -(token + 1000 + 4000)).all()


def test_only_the_named_layers_are_loaded():
    """A layer that was not asked for stays as it was."""
    layout = scheme("contiguous", 20, 1)
    buffers, holdings = saved(MODEL, filled(layout), layout)
    arena = HBMArena(MODEL.spec, 20)
    arena.load(list(copies(holdings, [shard_holding(layout, 0, 2)])), buffers, 1, 2)
    assert not arena.key[0].any()
    assert torch.equal(arena.key[1], filled(layout)[0].key[1])


def test_bfloat16_rows_are_moved_as_bytes():
    """A dtype that numpy does not know moves unchanged."""
    layout = scheme("contiguous", 5, 1)
    model = type("Model", (), {"spec": replace(MODEL.spec, dtype="bfloat16")})
    arenas = filled(layout, "bfloat16")
    buffers, holdings = saved(model, arenas, layout)
    assert torch.equal(loaded(model, buffers, holdings, layout)[0].key, arenas[0].key)


def test_a_segment_is_a_view():
    """Writing to the arena shows in the segment: nothing was copied."""
    arena = HBMArena(MODEL.spec, 10)
    segment = arena.segment(1, 4, (Span(0, 3),))
    arena.key[1, 0, 5] = 7.0
    assert (segment.key[0, 1] == 7.0).all()
    assert segment.key.shape == (2, 3, 16)


def test_kv_that_an_arena_does_not_hold_is_refused():
    """More than one layer group, latent KV, and dtypes without a tensor type."""
    group = MODEL.spec.groups[0]
    pair = (replace(group, layers=(0,)), replace(group, layers=(1,)))
    latent = (replace(group, kind=GroupKind.MLA, value_dim=0),)
    for groups in (pair, latent):
        with pytest.raises(InvalidSpec, match="exactly one gqa"):
            HBMArena(replace(MODEL.spec, groups=groups), 1)
    with pytest.raises(InvalidSpec, match="float8"):
        HBMArena(replace(MODEL.spec, dtype="float8_e4m3fn"), 1)
    assert extents_for(MODEL.spec, 1)
