"""The states of a copy: what is not in this table is a bug."""

import pytest
from holdfast.kvstore.residency import Event, IllegalTransition, Placement, State, Tier, after

LEGAL = {
    ("reserved", "fill"): "filling",
    ("reserved", "release"): "gone",
    ("filling", "complete"): "resident",
    ("filling", "fail"): "lost",
    ("resident", "drain"): "draining",
    ("resident", "fail"): "lost",
    ("draining", "hit"): "resident",
    ("draining", "fail"): "lost",
    ("draining", "release"): "gone",
    ("lost", "release"): "gone",
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_state_and_event(state, event):
    """Legal events lead where the design says, all others are our bug."""
    if (state.value, event.value) in LEGAL:
        assert after(state, event) == LEGAL[state.value, event.value]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            after(state, event)


def test_the_tables_words_exist():
    """A renamed state or event is noticed here."""
    assert {word for pair in LEGAL for word in pair[:1]} | {"gone"} == {state.value for state in State}
    assert {event for _, event in LEGAL} == {event.value for event in Event}


def placement(**fields):
    """A copy in DDR."""
    return Placement(extent="e", tenant="t", tier=Tier.DDR, device="ddr", size_bytes=1, **fields)


def test_a_held_copy_is_never_gone():
    """A slot is not reused while somebody uses its bytes."""
    copy = placement(state=State.DRAINING, holds=1)
    with pytest.raises(AssertionError, match="held"):
        copy.apply(Event.RELEASE)


def test_who_may_be_read_and_who_may_move():
    """Complete copies are read, also while they leave; only idle ones that stay are chosen by eviction."""
    assert [state for state in State if placement(state=state).readable] == ["resident", "draining"]
    assert [state for state in State if placement(state=state).movable] == ["resident"]
    assert not placement(state=State.RESIDENT, holds=1).movable


def test_nearer_tiers_are_smaller():
    """Floors compare tiers by number."""
    assert [tier.label for tier in sorted(Tier)] == ["hbm", "ddr", "nvme"]
