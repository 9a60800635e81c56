from dataclasses import replace
from math import inf, log

import pytest
import torch
from holdfast.kvstore.errors import ConfigError, MissingExtra
from holdfast.kvstore.layout import Span
from holdfast.ring_attention.attend import attend, attend_segment
from holdfast.ring_attention.band import DIAGONAL, FULL, Band, causal
from holdfast.ring_attention.kernels.registry import KERNELS, choose_kernel, unfit_kernels
from holdfast.ring_attention.merge import Accumulator
from holdfast.ring_attention.positions import Positions
from holdfast.ring_attention.segment import KVSegment

CPU, REFERENCE = KERNELS["cpu_flash"], KERNELS["reference"]
BANDS = [FULL, DIAGONAL, Band(-9, 0), Band(-3, 5), Band(first=4), Band(last=-50), Band(last=40), Band(200, 300)]
HEADS = [(4, 4), (6, 2), (4, 1)]  # MHA, GQA, MQA
SIZES = [(1, 97), (7, 97), (97, 97), (130, 97), (70, 300)]  # queries, keys
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float64: 1e-7}


def inputs(heads, kv_heads, dim, value_dim, tokens, rows, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(tokens * 1000 + rows)
    shapes = [(heads, tokens, dim), (kv_heads, rows, dim), (kv_heads, rows, value_dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def check(kernel, query, key, value, band):
    got, want = attend(kernel, query, key, value, band), attend(REFERENCE, query, key, value, band)
    assert got.out.dtype == got.lse.dtype == torch.float32
    assert torch.equal(got.lse == -inf, want.lse == -inf)
    seen = want.lse > -inf
    assert (got.out[~seen] == 0).all()
    assert (got.out - want.out).norm() <= ERRORS[query.dtype] * want.out.norm()
    lse_error = 5e-6 if query.dtype in (torch.float32, torch.float64) else 5e-3
    assert ((got.lse - want.lse)[seen].abs() <= lse_error).all()


class KernelContract:
    """What every kernel does, called through `attend`; skipped with the reason where it is unable to run."""

    name: str

    @pytest.fixture
    def device(self):
        (device, *_) = sorted(KERNELS[self.name].capabilities.devices)
        return torch.device(device)

    def kernel(self, device, dtype):
        reason = KERNELS[self.name].unfit(device, dtype)
        if reason is not None:
            pytest.skip(str(reason))
        return KERNELS[self.name]

    @pytest.mark.parametrize("dtype", ERRORS, ids=str)
    @pytest.mark.parametrize("dim", [32, 40, 64, 80, 96, 128, 256])
    def test_any_heads_and_bands(self, device, dtype, dim):
        """Out and natural-log lse agree with float64, whatever the kernel is unable to do itself."""
        kernel = self.kernel(device, dtype)
        for index, (heads, band) in enumerate((heads, band) for heads in HEADS for band in BANDS):
            check(kernel, *inputs(*heads, dim, dim, *SIZES[index % len(SIZES)], dtype, device), band)

    @pytest.mark.parametrize("dtype", ERRORS, ids=str)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_any_lengths(self, device, dtype, sizes):
        """More queries than keys and fewer, one, and more than a block."""
        kernel = self.kernel(device, dtype)
        for band in BANDS:
            check(kernel, *inputs(8, 2, 64, 64, *sizes, dtype, device), band)

    @pytest.mark.parametrize("dims", [(24, 16), (16, 24), (72, 64)], ids=str)
    def test_values_of_another_dim(self, device, dims):
        """As in latent attention."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        kernel = self.kernel(device, dtype)
        for band in (FULL, DIAGONAL, Band(-9, 0)):
            check(kernel, *inputs(4, 1, *dims, 33, 33, dtype, device), band)

    @pytest.mark.parametrize(("tokens", "rows"), [(0, 5), (3, 0), (0, 0)])
    def test_empty_operands_see_nothing(self, device, tokens, rows):
        """No keys: out 0 and lse -inf; no queries: nothing. Neither reaches the kernel, which may die."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        part = attend(self.kernel(device, dtype), *inputs(4, 2, 16, 16, tokens, rows, dtype, device), FULL)
        assert part.out.shape == (4, tokens, 16)
        assert (part.out == 0).all()
        assert (part.lse == -inf).all()

    def test_strided_views_are_read_as_they_are(self, device):
        """A segment of an arena is a strided view."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        kernel = self.kernel(device, dtype)
        (arena, _, tokens) = inputs(2, 5, 16, 16, 100, 4, dtype, device)
        view = arena[:, 10:40]
        check(kernel, tokens.repeat_interleave(4, 1).transpose(0, 1)[:8], view, view, DIAGONAL)


class TestCpuFlash(KernelContract):
    name = "cpu_flash"

    @pytest.mark.parametrize("tokens", [32, 33, 191, 192])
    @pytest.mark.parametrize("rows", [2048, 2049, 4500])
    def test_keys_in_pieces(self, tokens, rows):
        """As many queries as make float32 go through the keys piece by piece, and one more or less."""
        for dtype in (torch.float32, torch.bfloat16):
            check(KERNELS[self.name], *inputs(8, 2, 32, 32, tokens, rows, dtype), FULL)


class TestReference(KernelContract):
    name = "reference"


class TestCudaAten(KernelContract):
    name = "cuda_aten"


class TestTorchVarlen(KernelContract):
    name = "torch_varlen"


class TestFlashAttn(KernelContract):
    name = "flash_attn"


def test_every_kernel_has_its_contract():
    assert {contract.name for contract in KernelContract.__subclasses__()} == set(KERNELS)


@pytest.mark.parametrize("changes", [{"gqa": False}, {"masks": False}, {"head_dim_multiple": 32}], ids=str)
def test_what_a_kernel_lacks_is_arranged(changes):
    """The CPU kernel, said to be able to do less, gives the same."""
    kernel = replace(CPU, capabilities=replace(CPU.capabilities, **changes))
    for band in BANDS:
        check(kernel, *inputs(6, 2, 40, 40, 70, 90), band)


@pytest.mark.parametrize("masks", [True, False])
def test_a_query_between_keys_may_see_none(masks):
    """In a masked call over scattered tokens such a row gets out 0 and lse -inf, not what the kernel says."""
    query, key, value = inputs(4, 2, 16, 16, 8, 2)
    positions = Positions([Span(0, 4), Span(10, 14)])
    segment = KVSegment(key, value, (Span(2, 3), Span(11, 12)))
    kernel = replace(CPU, capabilities=replace(CPU.capabilities, masks=masks))
    total = Accumulator(4, 8, 16, query.device)
    attend_segment(total, 0, kernel, query, positions, segment, causal(3))
    part = total.result()
    blind = torch.tensor([True, True, False, False, True, False, False, False])  # 0, 1 and 10
    assert torch.equal(part.lse == -inf, blind.expand(4, 8))
    assert torch.equal(part.out == 0, blind[:, None].expand(4, 8, 16))


def test_a_base_2_lse_is_converted():
    """Whatever base a kernel counts in, partials merge in the natural one."""

    def base_2(query, key, value, sees, scale):
        out, lse = CPU.call(query, key, value, sees, scale)
        return out, lse / log(2)

    kernel = replace(CPU, call=base_2, capabilities=replace(CPU.capabilities, lse_base=2.0))
    for band in BANDS:
        check(kernel, *inputs(6, 2, 40, 40, 70, 90), band)


def test_a_native_band_is_one_call():
    """A kernel that knows windows gets each run of queries over each run of keys at once."""
    calls = []

    def counted(*arguments):
        calls.append(arguments[3])
        return REFERENCE.call(*arguments)

    kernel = replace(REFERENCE, call=counted)
    check(kernel, *inputs(4, 2, 16, 16, 300, 900), Band(-100, 30))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["cuda_aten", "torch_varlen"])
@pytest.mark.parametrize("band", [FULL, DIAGONAL], ids=str)
def test_the_cuda_operators_take_what_we_give_them(name, band):
    """Without a GPU only shapes can be checked: the operators' signatures, on the meta device."""
    for dtype in (torch.bfloat16, torch.float32):
        if dtype in KERNELS[name].capabilities.dtypes:
            part = attend(KERNELS[name], *inputs(8, 2, 64, 64, 45, 45, dtype, "meta"), band)
            assert part.out.shape == (8, 45, 64)
            assert part.lse.shape == (8, 45)
            assert part.out.dtype == part.lse.dtype == torch.float32


def test_an_unknown_kernel_is_named():
    """The error lists the kernels there are."""
    with pytest.raises(ConfigError, match="cpu_flash"):
        choose_kernel(torch.device("cpu"), torch.float32, "magic")


def test_an_unfit_kernel_says_why():
    """Neither another device nor another dtype is taken silently, and what is absent says what to install."""
    with pytest.raises(ConfigError, match="cuda_aten runs on cuda, not on cpu"):
        choose_kernel(torch.device("cpu"), torch.float32, "cuda_aten")
    with pytest.raises(ConfigError, match="not in int8"):
        choose_kernel(torch.device("cpu"), torch.int8, "cpu_flash")
    with pytest.raises(ConfigError, match="no attention kernel is fit"):
        choose_kernel(torch.device("cpu"), torch.int8)
    with pytest.raises(MissingExtra, match="pip install"):
        choose_kernel(torch.device("cuda"), torch.bfloat16, "flash_attn")


def test_the_best_fit_kernel_is_chosen():
    """By preference; `unfit_kernels` says why the others are not."""
    assert choose_kernel(torch.device("cpu"), torch.bfloat16).name == "cpu_flash"
    reasons = unfit_kernels(torch.device("cpu"), torch.float32)
    assert [name for name, reason in reasons.items() if not reason] == ["cpu_flash", "reference"]


def test_a_head_dim_beyond_the_kernel_is_refused():
    """Rather than computed wrongly."""
    kernel = replace(CPU, capabilities=replace(CPU.capabilities, head_dim_max=64))
    with pytest.raises(ConfigError, match="head dims up to 64"):
        attend(kernel, *inputs(2, 2, 80, 80, 3, 3), FULL)
