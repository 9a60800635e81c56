"""Where rows lie in a buffer."""

from dataclasses import replace

import pytest
from holdfast.kvstore.geometry import PLANE_ALIGN_BYTES, Geometry, arena_geometry, extent_geometry
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup


def spec(kv_heads=4, value_dim=8, kind=GroupKind.GQA):
    """Two layers, 32 tokens per extent, two bytes per element."""
    group = LayerGroup(kind=kind, layers=(0, 1), kv_heads=kv_heads, key_dim=12, value_dim=value_dim)
    return KVSpec(groups=(group,), dtype="bfloat16", model="m@1", vocabulary_size=10, block_tokens=16, extent_blocks=2)


@pytest.mark.parametrize("value_bytes", [0, 3])
@pytest.mark.parametrize("align", [1, 64])
def test_rows_in_canonical_order_never_overlap(value_bytes, align):
    """Layer, then key before value, then head, then row; planes begin aligned and nothing overlaps."""
    geometry = Geometry(layers=2, heads=3, rows=4, key_bytes=5, value_bytes=value_bytes, align=align)
    end = 0
    for layer in range(2):
        for part in range(geometry.parts):
            end = -(-end // align) * align
            assert geometry.plane_offset(layer, part) == end
            for head in range(3):
                for row in range(4):
                    assert geometry.offset(layer, part, head, row) == end
                    end += (5, value_bytes)[part]
    assert -(-end // align) * align == geometry.size_bytes


def test_planes_tile_their_layers():
    """The planes of all layers cover the buffer once, numbered in order."""
    geometry = extent_geometry(spec())
    planes = geometry.planes(0, geometry.layers)
    assert [number for number, _, _ in planes] == list(range(geometry.plane_count))
    assert [offset for _, offset, _ in planes] == [sum(size for *_, size in planes[:i]) for i in range(len(planes))]
    assert sum(size for *_, size in planes) == geometry.size_bytes
    assert all(offset % PLANE_ALIGN_BYTES == 0 for _, offset, _ in planes)
    assert geometry.planes(1, 2) == planes[2:]


def test_mla_has_one_plane_per_layer():
    """A latent cache has no value plane."""
    geometry = extent_geometry(spec(kv_heads=1, value_dim=0, kind=GroupKind.MLA))
    assert geometry.parts == 1
    assert geometry.plane_count == 2


def test_a_rank_has_its_share_of_heads():
    """With more ranks than heads, each has one."""
    assert [arena_geometry(spec(), 7, tp).heads for tp in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert arena_geometry(spec(), 7, 2).size_bytes == 2 * 2 * 7 * (24 + 16)


@pytest.mark.parametrize("where", [(2, 0, 0, 0), (0, 2, 0, 0), (0, 0, 4, 0), (0, 0, 0, 32), (-1, 0, 0, 0)])
def test_outside_is_our_bug(where):
    """An index outside the buffer is caught, never wrapped."""
    with pytest.raises(AssertionError):
        extent_geometry(spec()).offset(*where)


def test_a_native_extent_has_one_plane_of_pages_per_layer():
    """A page is as large as the keys and values of its tokens; the plane is padded, not the page."""
    pages = replace(spec(), page_format="pages/1", block_tokens=48, extent_blocks=4)
    geometry = extent_geometry(pages)
    assert (geometry.layers, geometry.parts, geometry.heads, geometry.rows) == (2, 1, 1, 4)
    assert geometry.row_bytes(0) == pages.page_bytes() == 48 * 4 * (12 + 8) * 2
    assert geometry.plane_bytes(0) % PLANE_ALIGN_BYTES == 0
    assert geometry.size_bytes == 2 * geometry.plane_bytes(0)
    assert geometry.offset(1, 0, 0, 2) == geometry.plane_bytes(0) + 2 * pages.page_bytes()
