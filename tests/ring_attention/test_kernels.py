from math import inf

import pytest
import torch
from holdfast.kvstore.errors import ConfigError
from holdfast.ring_attention.attend import attend
from holdfast.ring_attention.band import DIAGONAL, FULL, Band
from holdfast.ring_attention.kernels.registry import KERNELS, choose_kernel

CPU, REFERENCE = KERNELS["cpu_flash"], KERNELS["reference"]
SHAPES = [(4, 4, 16, 16), (8, 2, 64, 64), (6, 2, 40, 40), (4, 1, 24, 16), (4, 1, 16, 24)]
BANDS = [FULL, DIAGONAL, Band(-9, 0), Band(-3, 5), Band(first=4), Band(last=-50), Band(last=40)]


def inputs(heads, kv_heads, dim, value_dim, tokens, rows, dtype=torch.float32):
    torch.manual_seed(tokens * 1000 + rows)
    return (
        torch.randn(heads, tokens, dim, dtype=dtype),
        torch.randn(kv_heads, rows, dim, dtype=dtype),
        torch.randn(kv_heads, rows, value_dim, dtype=dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 130])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_a_kernel_agrees_with_float64(shape, tokens, band):
    """Out and natural-log lse of the CPU kernel, folded or not, whatever the band."""
    query, key, value = inputs(*shape, tokens, 97)
    got, want = (attend(kernel, query, key, value, band) for kernel in (CPU, REFERENCE))
    torch.testing.assert_close(got.out, want.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=5e-6, rtol=1e-5)
    assert got.out.dtype == got.lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_partials(dtype):
    """Partials leave the kernel in float32 whatever the cache's dtype."""
    query, key, value = inputs(8, 2, 64, 64, 5, 33, dtype)
    got, want = (attend(kernel, query, key, value, FULL) for kernel in (CPU, REFERENCE))
    assert got.out.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out, want.out, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kernel", [CPU, REFERENCE], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("tokens", "rows"), [(0, 5), (3, 0), (0, 0)])
def test_empty_operands_see_nothing(kernel, tokens, rows):
    """No keys: out 0 and lse -inf; no queries: nothing. Neither reaches the op, which would die."""
    part = attend(kernel, *inputs(4, 2, 16, 16, tokens, rows), FULL)
    assert part.out.shape == (4, tokens, 16)
    assert (part.out == 0).all()
    assert (part.lse == -inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("band", [FULL, DIAGONAL], ids=str)
def test_the_cuda_operators_take_what_we_give_them(dtype, band):
    """Without a GPU only shapes can be checked: the operators' signatures, on the meta device."""
    query, key, value = (part.to("meta") for part in inputs(8, 2, 64, 64, 45, 45, dtype))
    part = attend(KERNELS["cuda_aten"], query, key, value, band)
    assert part.out.shape == (8, 45, 64)
    assert part.lse.shape == (8, 45)
    assert part.out.dtype == part.lse.dtype == torch.float32


def test_strided_views_are_read_as_they_are():
    """A segment of an arena is a strided view; the kernel reads it without a copy being asked."""
    arena = torch.randn(2, 100, 16)
    query = torch.randn(5, 4, 16).transpose(0, 1)
    view = arena[:, 10:40]
    got = attend(CPU, query, view, view, FULL)
    want = attend(REFERENCE, query.contiguous(), view.contiguous(), view.contiguous(), FULL)
    torch.testing.assert_close(got.out, want.out, atol=2e-6, rtol=1e-5)


def test_an_unknown_kernel_is_named():
    """The error lists the kernels there are."""
    with pytest.raises(ConfigError, match="cpu_flash"):
        choose_kernel(torch.device("cpu"), torch.float32, "magic")


def test_an_unfit_kernel_says_why():
    """Neither another device nor another dtype is taken silently."""
    with pytest.raises(ConfigError, match="cuda_aten runs on cuda, not on cpu"):
        choose_kernel(torch.device("cpu"), torch.float32, "cuda_aten")
    with pytest.raises(ConfigError, match="not in int8"):
        choose_kernel(torch.device("cpu"), torch.int8, "cpu_flash")
    assert choose_kernel(torch.device("cpu"), torch.bfloat16).name == "cpu_flash"
