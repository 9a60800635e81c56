"""Oracles and small models for the tests of ring attention."""

from dataclasses import replace

import numpy as np
import torch
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.layout import Layout, Span, chunked, copies, extent_holding, shard_holding
from holdfast.kvstore.spec import sized
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.identity import spec_of
from holdfast.ring_attention.kernels.registry import KERNELS
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.model import Decoder
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.segment import KVSegment
from holdfast.ring_attention.shard import KVShard
from holdfast.ring_attention.synthetic import Scales, random_tensors

CPU_FLASH = KERNELS["cpu_flash"]
TINY = ModelConfig(vocabulary_size=64, hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, head_dim=16)


def tiny_model(seed=0, config=TINY, tp=1, tp_rank=0):
    """A model that fits a test: 512 bytes of KV per token, extents of 16 tokens."""
    spec = replace(spec_of(config, f"tiny-{seed}"), block_tokens=8)
    scales = Scales(scores=2.0, attention=1.0)
    return Decoder(config, sized(spec, target_bytes=8192), random_tensors(config, seed, scales), tp, tp_rank)


def tokens_of(count, seed=0, vocabulary=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


def dense(query, positions, key, value):
    """Causal attention in float64 of queries at `positions` over keys at 0, 1, ...: [H, T, Dv]."""
    group = query.shape[0] // key.shape[0]
    keys, values = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
    scores = query.double() @ keys.transpose(1, 2) / query.shape[2] ** 0.5
    hidden = torch.arange(key.shape[1])[None, :] > positions[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values


def take(spans):
    """The positions of spans as an index tensor."""
    return torch.tensor([p for s in spans for p in range(s.start, s.stop)], dtype=torch.int64)


def segments_of(key, value, held):
    """One rank's segments of the whole key and value."""
    return [KVSegment(key[:, take(spans)], value[:, take(spans)], spans) for spans in held]


def spans_in(layout, rank, start, stop):
    """A rank's spans between two positions."""
    cut = [Span(max(s.start, start), min(s.stop, stop)) for s in layout.spans(rank)]
    return tuple(span for span in cut if span.start < span.stop)


def prefilled(model, tokens, cp, chunk_tokens=64, spare=0):
    """Arenas by rank and the layout of a document prefilled at `cp`."""
    layout = chunked(Layout((), cp), len(tokens), chunk_tokens)

    def rank(communicator):
        arena = HBMArena(model.spec, layout.length(communicator.rank) + spare)
        shard = KVShard(arena=arena, layout=Layout((), cp))
        made = ContextParallelRunner(model, communicator).prefill(shard, tokens, chunk_tokens)
        assert made.layout == layout
        return arena

    return run_ranks(cp, rank), layout


def answers(model, arenas, layout, question, count, **more):
    """The answer of every rank over prefilled arenas."""

    def rank(communicator):
        shard = KVShard(arena=arenas[communicator.rank], layout=layout)
        return ContextParallelRunner(model, communicator).answer(shard, question, count, **more)

    return run_ranks(layout.cp, rank)


def extents_for(spec, token_count):
    """Empty extents of a document, and their holdings; buffer ids from 1000."""
    size, heads = spec.extent_tokens, spec.groups[0].kv_heads
    starts = range(0, token_count, size)
    holdings = [
        extent_holding(1000 + i, start, min(size, token_count - start), heads) for i, start in enumerate(starts)
    ]
    bytes_each = extent_geometry(spec).size_bytes
    return {h.buffer: np.zeros(bytes_each, np.uint8) for h in holdings}, holdings


def saved(model, arenas, layout):
    """The document's canonical extents, saved layer by layer from every rank's arena."""
    spec = model.spec
    buffers, holdings = extents_for(spec, layout.token_count)
    shards = [shard_holding(layout, rank, spec.groups[0].kv_heads) for rank in range(layout.ranks)]
    moves = list(copies(shards, holdings))
    for rank, arena in enumerate(arenas):
        mine = [copy for copy in moves if copy.source == rank]
        for layer in range(len(spec.groups[0].layers)):
            arena.save(mine, {i: memoryview(b) for i, b in buffers.items()}, extent_geometry(spec), layer, layer + 1)
    return buffers, holdings


def empty_arena(spec, layout, rank):
    """An arena with room for a rank's rows; of a latent row, half is the value."""
    group = spec.groups[0]
    latent = None if group.value_dim else group.key_dim // 2
    return HBMArena(spec, layout.length(rank // layout.tp), layout.tp, value_dim=latent)


def loaded(model, buffers, holdings, layout):
    """Fresh arenas of another layout, filled from read-only extents."""
    spec = model.spec
    shards = [shard_holding(layout, rank, spec.groups[0].kv_heads) for rank in range(layout.ranks)]
    moves = list(copies(holdings, shards))
    arenas = []
    for rank in range(layout.ranks):
        arena = empty_arena(spec, layout, rank)
        mine = [copy for copy in moves if copy.target == rank]
        views = {i: memoryview(b).toreadonly() for i, b in buffers.items()}
        arena.load(mine, views, extent_geometry(spec), 0, len(spec.groups[0].layers))
        arenas.append(arena)
    return arenas
