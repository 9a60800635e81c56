"""Clearing: which whole slabs to empty for a demand, so that no more leaves than the demand in whole slabs.

A slab serves one class of slots. Evicting copies in the order of their worth frees slots in many slabs of other
classes, and empties one only by chance; here the unit is the slab, and its price what all of its copies are worth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..eviction.candidate import Candidate
from .contest import Contest
from .slots import SlabPool, Slot, SlotClass


class Occupant(NamedTuple):
    """A copy that may leave on its own; `loss` is what its leaving costs."""

    candidate: Candidate
    slot: Slot
    loss: float


def whole_slabs_bytes(pool: SlabPool, wanted: Mapping[SlotClass, int]) -> int:
    """The demand in whole slabs, class by class: no clearing takes more."""
    return sum(-(-count // max(1, pool.per_slab(kind))) for kind, count in wanted.items()) * pool.slab_bytes


def rather_slabs(
    pool: SlabPool,
    wanted: Mapping[SlotClass, int],
    leaving: Sequence[Slot],
    victims: tuple[Candidate, ...] | None,
    occupants: Callable[[], Iterable[Occupant]],
    contest: Contest | None = None,
    slabs_most: int | None = None,
) -> tuple[Candidate, ...] | None:
    """The policy's victims; or who leaves whole slabs, where there are no victims or more than the demand in slabs.

    So no more leaves than the demand in whole slabs, wherever so many slabs can be cleared.
    """
    if victims is not None and sum(victim.size_bytes for victim in victims) <= whole_slabs_bytes(pool, wanted):
        return victims
    cleared = clear_slabs(pool, wanted, leaving, occupants(), contest, slabs_most)
    if cleared is None or (victims is not None and _rank(cleared) > max(victim.rank for victim in victims)):
        return victims  # better more of what is not pinned than less of what is
    return tuple(occupant.candidate for occupant in cleared)


def clear_slabs(
    pool: SlabPool,
    wanted: Mapping[SlotClass, int],
    leaving: Sequence[Slot],
    occupants: Iterable[Occupant],
    contest: Contest | None = None,
    slabs_most: int | None = None,
) -> tuple[Occupant, ...] | None:
    """Who leaves the cheapest slabs that have to be emptied for the demand; None when not enough can be.

    `leaving` are slots that will be free anyway. A slab that holds anything else than these and occupants stays.
    A contest says which tenants may lose slabs.
    """
    inside: dict[int, list[Occupant]] = defaultdict(list)
    for occupant in occupants:
        if not pool.is_fenced(occupant.slot.slab):
            inside[occupant.slot.slab].append(occupant)
    gone = Counter(slot.slab for slot in leaving)
    whole = [number for number, here in inside.items() if pool.used_slots(number) == len(here) + gone[number]]
    whole.sort(key=lambda number: (_rank(inside[number]), sum(occupant.loss for occupant in inside[number]), number))
    for permit in contest.permits() if contest is not None else [_anybody]:
        freed = list(leaving)
        chosen: list[Occupant] = []
        for number in whole:
            if _is_enough(pool, wanted, freed, chosen, contest, slabs_most):
                break
            here = inside[number]
            if permit(pool.owner(number) or "", sum(occupant.slot.size_bytes for occupant in here)):
                chosen += here
                freed += [occupant.slot for occupant in here]
        if _is_enough(pool, wanted, freed, chosen, contest, slabs_most):
            return tuple(chosen)
    return None


def _anybody(tenant: str, size_bytes: int) -> bool:  # noqa: ARG001 - whoever it is
    return True


def _is_enough(
    pool: SlabPool,
    wanted: Mapping[SlotClass, int],
    freed: Sequence[Slot],
    chosen: Sequence[Occupant],
    contest: Contest | None,
    slabs_most: int | None,
) -> bool:
    own = ((pool.owner(occupant.slot.slab) or "", occupant.slot.size_bytes) for occupant in chosen)
    return pool.fits(wanted, freed, slabs_most) and (contest is None or contest.met(own))


def _rank(occupants: Sequence[Occupant]) -> int:
    """Of the one that should leave last."""
    return max((occupant.candidate.rank for occupant in occupants), default=0)
