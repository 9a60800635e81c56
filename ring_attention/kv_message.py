"""KV messages: all of one rank's KV of a batch as one flat tensor, so that a hop is one transfer.

Shapes: Hkv kv heads, S rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kvstore.layout import Span
from .segment import KVSegment, span_tokens
from .share import SequenceShare


class KVMessages:
    """How the ranks' segments of a batch lie in messages: key then value of each segment, batch order.

    Latent values are columns of their keys and do not travel.
    """

    def __init__(self, batch: Sequence[SequenceShare]) -> None:
        """All segments of the batch have the same heads, dims and dtype."""
        self._batch = batch
        first = batch[0].segments[0]
        self._kv_heads = first.key.shape[0]
        self._dims = (first.key.shape[2], first.value.shape[2])
        self._latent = first.latent

    def pack(self) -> Tensor:
        """This rank's message: its KV as it lies, if that is one piece of memory already, else a copy."""
        segments = [segment for share in self._batch for segment in share.segments]
        planes = [plane for segment in segments for plane in self._planes(segment) if plane.numel()]
        if planes and _adjoin(planes):
            return planes[0].as_strided((sum(plane.numel() for plane in planes),), (1,))
        message = self.empty(sum(plane.numel() for plane in planes))
        offset = 0
        for plane in planes:  # not torch.cat, which would copy planes of an arena twice
            message[offset : offset + plane.numel()].view(plane.shape).copy_(plane)
            offset += plane.numel()
        return message

    def empty(self, elements: int) -> Tensor:
        """Room for a message of that length."""
        like = self._batch[0].segments[0].key
        if like.device.type != "cpu" or not elements:
            return like.new_empty(elements)
        # Numpy asks for huge pages: else making the pages of a large message costs more than copying it.
        return torch.from_numpy(np.empty(elements * like.element_size(), np.uint8)).view(like.dtype)

    def elements(self, rank: int) -> int:
        """Length of the message of a rank."""
        tokens = sum(span_tokens(spans) for share in self._batch for spans in share.held[rank])
        return tokens * self._kv_heads * (self._dims[0] if self._latent else sum(self._dims))

    def unpack(self, message: Tensor, rank: int) -> list[Sequence[KVSegment]]:
        """Views of the segments, by sequence, in the message of a rank."""
        sequences: list[Sequence[KVSegment]] = []
        offset = 0
        for share in self._batch:
            segments = []
            for spans in share.held[rank]:
                parts = []
                for dim in self._dims[: 1 if self._latent else 2]:
                    shape = (self._kv_heads, span_tokens(spans), dim)
                    stop = offset + shape[0] * shape[1] * dim
                    parts.append(message[offset:stop].view(shape))
                    offset = stop
                segments.append(_segment(parts, self._dims[1], spans))
            sequences.append(segments)
        return sequences

    def _planes(self, segment: KVSegment) -> list[Tensor]:
        return [segment.key] if self._latent else [segment.key, segment.value]


def _segment(parts: Sequence[Tensor], value_dim: int, spans: tuple[Span, ...]) -> KVSegment:
    if len(parts) == 1:
        return KVSegment.of_latents(parts[0], value_dim, spans)
    return KVSegment(parts[0], parts[1], spans)


def _adjoin(planes: Sequence[Tensor]) -> bool:
    """Whether the planes lie contiguous in one storage, each where the one before ends."""
    place = planes[0].data_ptr()
    storage = planes[0].untyped_storage().data_ptr()
    for plane in planes:
        if not plane.is_contiguous() or plane.data_ptr() != place or plane.untyped_storage().data_ptr() != storage:
            return False
        place += plane.numel() * plane.element_size()
    return True
