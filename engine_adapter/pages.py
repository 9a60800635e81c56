"""Pages: how engines lay out the KV of one layer's page, and native specs, which keep such pages as they are.

A format is a value of strides: nothing is computed by it, so decoding is one strided copy and exact. `native` makes the
spec under which pages are stored, `page_format` finds the format of such a spec again, `key_value` looks at pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..kvstore.errors import InvalidSpec, UnknownPageFormat
from ..kvstore.spec import KVSpec, LayerGroup, sized

Array = npt.NDArray[Any]
TAG: Final = re.compile(r"(?P<name>[a-z0-9-]+/[0-9]+):tokens=(?P<tokens>[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strides:
    """Where element (head, token, dim) lies in a page: offset + head x `head` + token x `token` + dim x `dim`.

    All are in elements.
    """

    offset: int
    head: int
    token: int
    dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFormat:
    """How an engine keeps `tokens` tokens of one layer in one page: `key` [heads, tokens, key_dim] and `value`.

    `verified` says that pages of a real engine were read by it and compared.
    """

    name: str
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    key: Strides
    value: Strides
    verified: bool

    @property
    def tag(self) -> str:
        """What KVSpec.page_format holds: name and tokens; heads and dims are the spec's."""
        return f"{self.name}:tokens={self.tokens}"

    @property
    def elements(self) -> int:
        """Elements of one page."""
        return self.tokens * self.heads * (self.key_dim + self.value_dim)


def vllm_cpu_vec(tokens: int, heads: int, key_dim: int, value_dim: int) -> PageFormat:
    """Pages of vLLM's CPU backend, ISAs "vec" and "vec16": for each head K as [dim, tokens], then V as [tokens, dim].

    [pages, heads, tokens, 2 x dim] is only what the tensor says of itself (vLLM 0.32, cpu_attn.py; packed by its kernel
    and compared). ISA "amx" packs tiles of 16 x 2: no strides say that, see `undescribed`.
    """
    head = tokens * (key_dim + value_dim)
    return PageFormat(
        name="vllm-cpu-vec/1",
        tokens=tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        key=Strides(offset=0, head=head, token=1, dim=tokens),
        value=Strides(offset=tokens * key_dim, head=head, token=value_dim, dim=1),
        verified=True,
    )


def vllm_flash_nhd(tokens: int, heads: int, key_dim: int, value_dim: int) -> PageFormat:
    """Pages of vLLM's FlashAttention backend in layout LBNHC: for each token, for each head, K then V.

    From the published source: the tensor [pages, heads, tokens, 2 x dim] is split in its last dimension (vLLM 0.32,
    v1/attention/backends/flash_attn.py); KVCacheLayout says the order in memory. No GPU has confirmed it.
    """
    row = key_dim + value_dim
    return _flash("vllm-flash-nhd/1", (tokens, heads, key_dim, value_dim), head=row, token=heads * row)


def vllm_flash_hnd(tokens: int, heads: int, key_dim: int, value_dim: int) -> PageFormat:
    """The same in layout LBHNC: for each head, for each token, K then V. No GPU has confirmed it."""
    row = key_dim + value_dim
    return _flash("vllm-flash-hnd/1", (tokens, heads, key_dim, value_dim), head=tokens * row, token=row)


def _flash(name: str, shape: tuple[int, int, int, int], *, head: int, token: int) -> PageFormat:
    tokens, heads, key_dim, value_dim = shape
    return PageFormat(
        name=name,
        tokens=tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        key=Strides(offset=0, head=head, token=token, dim=1),
        value=Strides(offset=key_dim, head=head, token=token, dim=1),
        verified=False,
    )


FORMATS: Final[Mapping[str, Callable[[int, int, int, int], PageFormat]]] = {  # by name: (tokens, heads, key, value dim)
    "vllm-cpu-vec/1": vllm_cpu_vec,
    "vllm-flash-nhd/1": vllm_flash_nhd,
    "vllm-flash-hnd/1": vllm_flash_hnd,
}


def native(spec: KVSpec, page_format: PageFormat, *, accept: Literal["verified", "any"] = "verified") -> KVSpec:
    """The spec of the same model's KV in pages of this format.

    Raises InvalidSpec for a format that is not of this model's shape, UnknownPageFormat for one that was never compared
    with a real engine's pages, unless any is accepted.
    """
    if accept == "verified" and not page_format.verified:
        raise UnknownPageFormat(
            f"{page_format.name} follows the engine's source, was never compared with its pages; accept it by name"
        )
    made = undescribed(spec, page_format.name, page_format.tokens)
    if page_format not in [_of_group(made, group, page_format.name) for group in made.groups]:
        shape = (page_format.heads, page_format.key_dim, page_format.value_dim)
        raise InvalidSpec(f"no layer group of {spec.model} has {shape} heads, key and value dims, as these pages have")
    return made


def undescribed(spec: KVSpec, name: str, tokens: int) -> KVSpec:
    """The spec of the same model's KV in pages that only their engine can read: kept, given back, never decoded.

    `name` is to be new for each way of packing, such as "vllm-cpu-amx/1".
    """
    return sized(replace(spec, page_format=f"{name}:tokens={tokens}", block_tokens=tokens))


def page_format(spec: KVSpec, group: int = 0) -> PageFormat:
    """The format of a native spec's pages, for one layer group. Raises UnknownPageFormat."""
    tag = TAG.fullmatch(spec.page_format)
    if tag is None or tag["name"] not in FORMATS or int(tag["tokens"]) != spec.block_tokens:
        raise UnknownPageFormat(
            f"pages of format {spec.page_format!r} cannot be decoded here; read them with `LayerKV.pages`, or upgrade "
            f"Holdfast (it knows {', '.join(FORMATS)})"
        )
    return _of_group(spec, spec.groups[group], tag["name"])


def _of_group(spec: KVSpec, group: LayerGroup, name: str) -> PageFormat:
    return FORMATS[name](spec.block_tokens, group.kv_heads, group.key_dim, group.value_dim)


def key_value(page_format: PageFormat, pages: Array) -> tuple[Array, Array]:
    """Keys and values of pages [..., elements]: views [..., heads, tokens, dim], writable where `pages` is."""
    assert pages.shape[-1] == page_format.elements, "a page has as many elements as its format says"
    element_bytes = pages.itemsize
    views = []
    for strides, dim in ((page_format.key, page_format.key_dim), (page_format.value, page_format.value_dim)):
        steps = [step * element_bytes for step in (strides.head, strides.token, strides.dim)]
        views.append(
            as_strided(
                pages[..., strides.offset :],
                (*pages.shape[:-1], page_format.heads, page_format.tokens, dim),
                (*pages.strides[:-1], *(step * pages.strides[-1] // element_bytes for step in steps)),
                writeable=pages.flags.writeable,
            )
        )
    return views[0], views[1]
