from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from holdfast.kvstore.errors import InvalidRequest, InvalidSpec, LayoutError
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.layout import Span, copies, heads_of, scheme, shard_holding
from holdfast.kvstore.spec import GroupKind
from holdfast.ring_attention.arena import TORCH_DTYPES, HBMArena
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.pass_kv import pass_kv
from holdfast.ring_attention.share import SequenceShare
from holdfast.ring_attention.staging import Staging
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_helpers import CPU_FLASH, dense, empty_arena, extents_for, loaded, saved, take, tiny_model

MODEL = tiny_model()
LATENT = replace(MODEL.spec.groups[0], kind=GroupKind.MLA, kv_heads=1, key_dim=48, value_dim=0)


def spec_with(kv_heads=2, dtype="float32"):
    """A spec with that many heads; None is a latent cache."""
    group = replace(MODEL.spec.groups[0], kv_heads=kv_heads) if kv_heads else LATENT
    return replace(MODEL.spec, groups=(group,), dtype=dtype)


def bits(plane):
    """The plane as integers of the same size: in two bytes, a number rounded as bfloat16 would name no row."""
    return plane.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[plane.dtype.itemsize])


def filled(layout, spec=MODEL.spec):
    """One arena per rank whose rows hold integers that name (part, layer, head of the model, token)."""
    arenas = []
    for rank in range(layout.ranks):
        arena = empty_arena(spec, layout, rank)
        first, stop = heads_of(rank % layout.tp, layout.tp, spec.groups[0].kv_heads)
        for span in layout.spans(rank // layout.tp):
            tokens = torch.arange(span.start, span.stop)[:, None]
            rows = slice(span.row, span.row + len(tokens))
            for layer in range(2):
                for head in range(first, stop):
                    named = tokens + 1000 * head + 8000 * layer
                    bits(arena.key)[layer, head - first, rows] = named.to(bits(arena.key).dtype)
                    if spec.groups[0].value_dim:
                        bits(arena.value)[layer, head - first, rows] = (named + 20_000).to(bits(arena.key).dtype)
        arenas.append(arena)
    return arenas


SCHEMES = st.sampled_from(["contiguous", "zigzag", "striped"])


@given(
    st.integers(1, 70),
    st.tuples(SCHEMES, st.integers(1, 4), st.sampled_from([1, 2, 4, 8])),
    st.tuples(SCHEMES, st.integers(1, 4), st.sampled_from([1, 2, 4, 8])),
    st.sampled_from([None, 1, 2, 4]),
    st.sampled_from(TORCH_DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_rows_survive_the_way_through_extents(count, first, second, kv_heads, dtype):
    """Saved by cp x tp ranks and loaded by others, every row is where the other layout says, whatever the KV."""
    spec = spec_with(kv_heads, dtype)
    model = SimpleNamespace(spec=spec)
    source, target = scheme(first[0], count, *first[1:]), scheme(second[0], count, *second[1:])
    buffers, holdings = saved(model, filled(source, spec), source)
    for arena, expected in zip(loaded(model, buffers, holdings, target), filled(target, spec), strict=True):
        assert torch.equal(arena.key, expected.key)
        assert torch.equal(arena.value, expected.value)


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 2), (4, 2), (2, 4), (2, None)])
@pytest.mark.parametrize("staged", ["load", "save", "both"])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # extents are read-only here
def test_the_way_of_a_gpu_moves_the_same_bytes(name, staged, tp, kv_heads, monkeypatch):
    """Staged on the CPU device: what a GPU does, without its stream and its pinned memory."""
    layout, other = scheme(name, 70, 2, tp), scheme("contiguous", 70, 3, 2)
    model = SimpleNamespace(spec=spec_with(kv_heads, "bfloat16"))
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
    buffers, holdings = saved(model, filled(layout, model.spec), layout)
    for arena, expected in zip(loaded(model, buffers, holdings, other), filled(other, model.spec), strict=True):
        assert arena.staging is not None
        assert torch.equal(arena.key, expected.key)
        assert torch.equal(arena.value, expected.value)


def test_extents_are_canonical():
    """Row (layer, part, head, token) of a saved extent lies where the geometry says."""
    layout = scheme("zigzag", 40, 2)
    buffers, holdings = saved(MODEL, filled(layout), layout)
    extent = extent_geometry(MODEL.spec)
    second = holdings[1]
    row = buffers[second.buffer][extent.offset(1, 1, 1, 3) :][:64].view(np.int32)
    token = second.spans[0].start + 3
    assert (row == token + 1000 + 8000 + 20_000).all()


def test_only_the_named_layers_are_loaded():
    """A layer that was not asked for stays as it was."""
    layout = scheme("contiguous", 20, 1)
    buffers, holdings = saved(MODEL, filled(layout), layout)
    arena = HBMArena(MODEL.spec, 20)
    arena.load(list(copies(holdings, [shard_holding(layout, 0, 2)])), buffers, extent_geometry(MODEL.spec), 1, 2)
    assert not arena.key[0].any()
    assert torch.equal(arena.key[1], filled(layout)[0].key[1])


def test_ranks_that_share_a_head_save_it_once():
    """Of the ranks that keep one head, the first saves it; all of them load it."""
    layout = scheme("zigzag", 40, 2, 4)
    spec = spec_with(2)
    _, holdings = extents_for(spec, 40)
    shards = [shard_holding(layout, rank, 2) for rank in range(layout.ranks)]
    assert {copy.source for copy in copies(shards, holdings)} == {0, 2, 4, 6}
    assert {copy.target for copy in copies(holdings, shards)} == set(range(8))


@pytest.mark.parametrize(("kv_heads", "tp", "share"), [(4, 1, 4), (4, 2, 2), (4, 4, 1), (2, 8, 1), (None, 4, 1)])
def test_an_arena_has_room_for_the_heads_of_one_rank(kv_heads, tp, share):
    """No more: that is what tensor parallelism is for."""
    spec = spec_with(kv_heads)
    arena = empty_arena(spec, scheme("contiguous", 10, 1, tp), 0)
    assert arena.key.shape == (2, share, 10, spec.groups[0].key_dim)
    assert arena.value.shape[:3] == arena.key.shape[:3]
    assert arena.key.untyped_storage().nbytes() == arena.key.numel() * 4


def test_the_value_of_a_latent_row_is_its_front():
    """Nothing is stored twice: the segment's value is a view of its key."""
    arena = HBMArena(spec_with(None), 10, tp=4, value_dim=32)
    latent = torch.randn(1, 3, 48)
    arena.write(1, 2, latent, latent[..., :32])
    segment = arena.segment(1, 2, (Span(0, 3),))
    assert torch.equal(segment.key, latent)
    assert torch.equal(segment.value, latent[..., :32])
    assert segment.latent
    assert segment.value.data_ptr() == segment.key.data_ptr() == arena.key[1, 0, 2].data_ptr()


def test_a_segment_is_a_view():
    """Writing to the arena shows in the segment: nothing was copied."""
    arena = HBMArena(MODEL.spec, 10)
    segment = arena.segment(1, 4, (Span(0, 3),))
    arena.key[1, 0, 5] = 7.0
    assert (segment.key[0, 1] == 7.0).all()
    assert segment.key.shape == (2, 3, 16)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=20)
def test_latent_kv_is_attended_over_any_layout(count, cp, other_cp, tp):
    """Saved by one group and loaded by another, its ring gives what dense attention of the latents gives."""
    spec = spec_with(None)
    model = SimpleNamespace(spec=spec)
    generator = torch.Generator().manual_seed(count)
    query, latent = (torch.randn(heads, count, 48, generator=generator) for heads in (6, 1))
    source, target = scheme("zigzag", count, cp, tp), scheme("striped", count, other_cp)
    arenas = [empty_arena(spec, source, rank) for rank in range(source.ranks)]
    for rank, arena in enumerate(arenas):
        rows = latent[:, take(source.spans(rank // tp))]
        arena.write(1, 0, rows, rows[..., :24])
    reloaded = loaded(model, *saved(model, arenas, source), target)
    held = [[target.spans(rank)] for rank in range(other_cp)]
    asked = [target.spans(rank) for rank in range(other_cp)]

    def rank(communicator):
        mine = asked[communicator.rank]
        share = SequenceShare(asked, [reloaded[communicator.rank].segment(1, 0, mine)], held)
        return pass_kv(communicator, CPU_FLASH, query[:, take(mine)], [share])

    expected = dense(query, torch.arange(count), latent, latent[..., :24])
    for number, out in enumerate(run_ranks(other_cp, rank)):
        assert torch.allclose(out, expected[:, take(asked[number])].float(), atol=1e-5)


def test_kv_that_an_arena_does_not_hold_is_refused():
    """More than one layer group, a window's, dtypes without a tensor type, and heads that cannot be dealt."""
    group = MODEL.spec.groups[0]
    pair = (replace(group, layers=(0,)), replace(group, layers=(1,)))
    window = (replace(group, kind=GroupKind.SLIDING, window=4),)
    for groups in (pair, window):
        with pytest.raises(InvalidSpec, match="exactly one gqa"):
            HBMArena(replace(MODEL.spec, groups=groups), 1)
    for spec, value_dim in ((spec_with(None), None), (spec_with(None), 49), (spec_with(None), 0), (MODEL.spec, 16)):
        with pytest.raises(InvalidSpec, match="value_dim"):
            HBMArena(spec, 1, value_dim=value_dim)
    with pytest.raises(LayoutError, match="tp=3"):
        HBMArena(MODEL.spec, 1, tp=3)
    with pytest.raises(InvalidSpec, match="float8"):
        HBMArena(replace(MODEL.spec, dtype="float8_e4m3fn"), 1)


def test_rows_that_no_memory_takes_are_refused_with_a_clear_error():
    """Not by the death of the rank."""
    with pytest.raises(InvalidRequest, match="for rows"):
        HBMArena(tiny_model().spec, 1 << 50)
