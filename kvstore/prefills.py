"""Prefills: what prefills took, by model and by how many ranks shared the work, and the curves that fit them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from .costs import PrefillCurve, PrefillPoint
from .spec import KVSpec

POINTS_KEPT: Final = 256  # per curve: enough for one long document's chunks, and bounded
CURVES_KEPT: Final = 8  # per model


class Prefill(NamedTuple):
    """One measured prefill, on a group of `ranks`."""

    cached_tokens: int
    new_tokens: int
    seconds: float
    ranks: int = 1


class Prefills:
    """A curve a model and number of ranks (cp * tp), for a group of more ranks computes faster.

    Where nobody has told what prefills of an engine's pages take, the same model's in canonical form count.
    """

    def __init__(self, specs: Mapping[bytes, KVSpec]) -> None:
        self._specs = specs
        self._canonical: dict[bytes, bytes] = {}  # of native specs: fingerprint of the canonical one
        self._points: dict[bytes, dict[int, deque[Prefill]]] = {}  # by ranks; observed last stands last
        self._curves: dict[tuple[bytes, int], PrefillCurve] = {}

    def curve(self, fingerprint: bytes, ranks: int | None = None) -> PrefillCurve:
        """The curve of a group of `ranks`; where none was observed or named, the one observed last, else the prior."""
        fingerprint = fingerprint if fingerprint in self._points else self._in_canonical_form(fingerprint)
        known = self._points.get(fingerprint)
        if known is None:
            return PrefillCurve()
        return self._curves[fingerprint, ranks if ranks is not None and ranks in known else next(reversed(known))]

    def _in_canonical_form(self, fingerprint: bytes) -> bytes:
        spec = self._specs.get(fingerprint)
        if spec is None or not spec.page_format:
            return fingerprint
        if fingerprint not in self._canonical:
            self._canonical[fingerprint] = spec.canonical().fingerprint()
        return self._canonical[fingerprint]

    def observe(self, fingerprint: bytes, points: Iterable[Prefill]) -> None:
        """Measured prefills, in the order in which they were made, correct their curves."""
        known = self._points.setdefault(fingerprint, {})
        touched = set()
        for point in points:
            touched.add(point.ranks)
            kept = known.pop(point.ranks, deque[Prefill](maxlen=POINTS_KEPT))
            kept.append(point)
            known[point.ranks] = kept
        for ranks in list(known)[:-CURVES_KEPT]:
            del known[ranks]
            self._curves.pop((fingerprint, ranks), None)
        for ranks in touched & known.keys():
            measured = [PrefillPoint(cached_tokens=p, new_tokens=t, seconds=s) for p, t, s, _ in known[ranks]]
            self._curves[fingerprint, ranks] = PrefillCurve().fitted(measured)
        if not known:
            del self._points[fingerprint]

    def points(self, fingerprint: bytes) -> tuple[Prefill, ...]:
        """All that are remembered of a model; `observe` makes the same curves of them."""
        return tuple(point for kept in self._points.get(fingerprint, {}).values() for point in kept)
