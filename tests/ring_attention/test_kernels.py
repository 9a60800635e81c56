from math import inf

import pytest
import torch
from holdfast.kvstore.errors import ConfigError
from holdfast.ring_attention.kernels import Mask, attend

SHAPES = [(4, 4, 16, 16), (8, 2, 64, 64), (6, 2, 40, 40), (4, 1, 24, 16), (4, 1, 16, 24)]


def inputs(heads, kv_heads, dim, value_dim, tokens, rows, dtype=torch.float32):
    torch.manual_seed(tokens * 1000 + rows)
    return (
        torch.randn(heads, tokens, dim, dtype=dtype),
        torch.randn(kv_heads, rows, dim, dtype=dtype),
        torch.randn(kv_heads, rows, value_dim, dtype=dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 130])
@pytest.mark.parametrize("mask", Mask)
def test_a_kernel_agrees_with_float64(shape, tokens, mask):
    """Out and natural-log lse of the CPU kernel, folded or not, causal or not."""
    query, key, value = inputs(*shape, tokens, tokens if mask is Mask.DIAGONAL else 97)
    got, want = (attend(query, key, value, mask, name) for name in ("cpu_flash", "reference"))
    torch.testing.assert_close(got.out, want.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=5e-6, rtol=1e-5)
    assert got.out.dtype == got.lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_partials(dtype):
    """Partials leave the kernel in float32 whatever the cache's dtype."""
    query, key, value = inputs(8, 2, 64, 64, 5, 33, dtype)
    got, want = (attend(query, key, value, Mask.FULL, name) for name in ("cpu_flash", "reference"))
    assert got.out.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out, want.out, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["cpu_flash", "reference"])
@pytest.mark.parametrize(("tokens", "rows"), [(0, 5), (3, 0), (0, 0)])
def test_empty_operands_see_nothing(name, tokens, rows):
    """No keys: out 0 and lse -inf; no queries: nothing. Neither reaches the op, which would die."""
    part = attend(*inputs(4, 2, 16, 16, tokens, rows), Mask.FULL, name)
    assert part.out.shape == (4, tokens, 16)
    assert (part.out == 0).all()
    assert (part.lse == -inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", Mask)
def test_the_cuda_operators_take_what_we_give_them(dtype, mask):
    """Without a GPU only shapes can be checked: the operators' signatures, on the meta device."""
    query, key, value = (part.to("meta") for part in inputs(8, 2, 64, 64, 45, 45, dtype))
    part = attend(query, key, value, mask, "cuda_aten")
    assert part.out.shape == (8, 45, 64)
    assert part.lse.shape == (8, 45)
    assert part.out.dtype == part.lse.dtype == torch.float32


def test_strided_views_are_read_as_they_are():
    """A segment of an arena is a strided view; the kernel reads it without a copy being asked."""
    arena = torch.randn(2, 100, 16)
    query = torch.randn(5, 4, 16).transpose(0, 1)
    view = arena[:, 10:40]
    got = attend(query, view, view, Mask.FULL)
    want = attend(query.contiguous(), view.contiguous(), view.contiguous(), Mask.FULL, "reference")
    torch.testing.assert_close(got.out, want.out, atol=2e-6, rtol=1e-5)


def test_an_unknown_kernel_is_named():
    """The error lists the kernels there are."""
    with pytest.raises(ConfigError, match="cpu_flash"):
        attend(*inputs(4, 2, 16, 16, 2, 2), Mask.FULL, "magic")
