"""Which adapter gets which slot: under any history of asking, leaving, loading and failing, against what must always hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.slots import Place, Slots

COUNT, MAX_BYTES = 3, 10
SIZES = {"a": 1, "b": 3, "c": 4, "d": 6, "e": 10, "f": 2}


class SlotMachine(RuleBasedStateMachine):
    """The model beside it: who holds what, who waits in which order, and what each slot of the ranks has in it."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(COUNT, MAX_BYTES)
        self.held: list[Place] = []
        self.waiting: dict[str, int] = {}  # number of those who wait, in the order of the keys' arrival
        self.ranks: dict[int, str] = {}  # what was read into each slot and not dropped
        self.loading: list[Place] = []

    def advance(self) -> None:
        while grant := self.slots.grant():
            place = grant.place
            assert place.key == next(iter(self.waiting)), "first come, first served"
            for slot in grant.evicted:
                gone = self.ranks.pop(slot)
                assert not any(other.slot == slot and other.key == gone for other in self.held + self.loading), (
                    "one in use was evicted"
                )
            if grant.is_new:
                assert place.slot not in self.ranks, "put over one that is still there"
                self.ranks[place.slot] = place.key
                self.loading.append(place)
            for _ in range(self.waiting.pop(place.key)):
                self.slots.hold(place)
                self.held.append(place)

    @rule(key=st.sampled_from(sorted(SIZES)))
    def ask(self, key: str) -> None:
        place = self.slots.ask(key, SIZES[key])
        if place:
            self.held.append(place)
        else:
            self.waiting[key] = self.waiting.get(key, 0) + 1
        self.advance()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.slots.release(place)
        self.advance()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[key]
        self.slots.forget(key)
        self.advance()

    @precondition(lambda self: self.loading)
    @rule(succeeds=st.booleans())
    def end_a_load(self, succeeds: bool) -> None:
        place = self.loading.pop(0)
        if succeeds:
            self.slots.loaded(place)
        else:
            del self.ranks[place.slot]
            self.slots.failed(place)
            for _ in range(self.held.count(place)):  # those who hold it are told, and let go
                self.held.remove(place)
                self.slots.release(place)
        self.advance()

    @invariant()
    def nothing_is_lost_doubled_or_exceeded(self) -> None:
        self.slots.check_integrity()
        assert {place.slot: place.key for place in self.slots.places} == self.ranks
        assert len(self.ranks) <= COUNT
        assert sum(SIZES[key] for key in self.ranks.values()) <= MAX_BYTES
        for place in self.slots.places:
            assert place.holders == self.held.count(place)
        assert all(self.ranks[place.slot] == place.key for place in self.held), "somebody holds what is gone"

    @invariant()
    def nobody_waits_for_what_could_be_had(self) -> None:
        if self.waiting and not self.held and not self.loading:
            raise AssertionError("everything is idle, and somebody waits")

    def teardown(self) -> None:
        """However full it was: when those at work finish, all who wait have their turn."""
        while self.waiting:
            assert self.held or self.loading, "a standstill"
            if self.loading:
                self.slots.loaded(self.loading.pop(0))
            else:
                self.slots.release(self.held.pop())
            self.advance()


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_of_the_idle_ones_the_one_used_longest_ago_goes() -> None:
    slots = Slots(2, 100)

    def use(key: str) -> Place:
        place = slots.ask(key, 1)
        if place is None:
            grant = slots.grant()
            assert grant
            place = grant.place
            slots.hold(place)
        slots.loaded(place)
        slots.release(place)
        return place

    use("a"), use("b"), use("a")
    assert use("c").slot == 2
    assert {place.key for place in slots.places} == {"a", "c"}


def test_a_newcomer_gets_a_place_though_the_others_are_always_in_use() -> None:
    """Every adapter has a new caller before its last one leaves: one of them must let its callers wait."""
    slots, held = Slots(2, 100), []
    for key in ("a", "b"):
        slots.ask(key, 1)
        grant = slots.grant()
        assert grant
        slots.hold(grant.place)
        slots.loaded(grant.place)
        held.append(grant.place)
    assert slots.ask("c", 1) is None
    for _ in range(3):
        assert slots.grant() is None
        for place in list(held):
            if again := slots.ask(place.key, 1):
                held.append(again)
            held.remove(place)
            slots.release(place)
        if grant := slots.grant():
            assert grant.place.key == "c"
            return
    raise AssertionError("it waits for ever")
