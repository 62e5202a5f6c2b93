"""Stories of the kind of bAbI: persons who move, take, drop and give, and a question that the facts answer.

They are told in the words of bAbI's first five tasks, but simulated here, so that an evaluation needs no download.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVED = ("went to", "moved to", "journeyed to", "travelled to", "went back to")
TOOK = ("got", "grabbed", "picked up", "took")
DROPPED = ("discarded", "dropped", "left", "put down")
GAVE = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    """Facts in their order, a question about them, and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]
    """Which facts the answer rests on, in their order."""


def story(task: str, rng: random.Random) -> Story:
    """A story of the shape of qa1 to qa5, with an answer that its facts leave no doubt about."""
    while True:
        found = _SHAPES[task](rng)
        if found is not None:
            return found


@dataclass
class _Stay:
    """An object came to be at a place."""

    place: str
    facts: tuple[int, ...]
    """Those that tell: who had it, and that this person was there."""


@dataclass
class _World:
    """What is known after the facts so far. Nobody is anywhere before they have moved."""

    rng: random.Random
    persons: tuple[str, ...]
    facts: list[str] = field(default_factory=list)
    at: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Person: the place, and the fact that says so."""
    holder: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Object: who has it, and the fact that says so."""
    stays: dict[str, list[_Stay]] = field(default_factory=dict)
    """Object: where it has been, one after the other."""
    gifts: list[tuple[str, str, str, int]] = field(default_factory=list)
    """Giver, object, receiver, fact."""

    def tell(self, facts: int, *, things: bool = True, giving: bool = False) -> None:
        """Let happen what gives so many facts."""
        while len(self.facts) < facts:
            acts: list[Callable[[], None]] = [self._move]
            if things:
                acts += [self._take, self._take, self._drop]
            if giving:
                acts += [self._give] * 3
            self.rng.choice(acts)()

    def _say(self, fact: str) -> int:
        self.facts.append(fact)
        return len(self.facts) - 1

    def _stay(self, thing: str, place: str, *facts: int) -> None:
        stays = self.stays.setdefault(thing, [])
        if not stays or stays[-1].place != place:
            stays.append(_Stay(place, tuple(sorted(facts))))

    def _move(self) -> None:
        person = self.rng.choice(self.persons)
        here, _ = self.at.get(person, ("", 0))
        place = self.rng.choice([place for place in PLACES if place != here])
        fact = self._say(f"{person} {self.rng.choice(MOVED)} the {place}.")
        self.at[person] = place, fact
        for thing, (holder, since) in self.holder.items():
            if holder == person:
                self._stay(thing, place, since, fact)

    def _take(self) -> None:
        """Where somebody is, whatever is not known to be elsewhere or with another may be."""
        free = [
            (person, thing)
            for person in sorted(self.at)
            for thing in OBJECTS
            if thing not in self.holder
            and (thing not in self.stays or self.stays[thing][-1].place == self.at[person][0])
        ]
        if free:
            person, thing = self.rng.choice(free)
            fact = self._say(f"{person} {self.rng.choice(TOOK)} the {thing}{self._there()}.")
            self.holder[thing] = person, fact
            place, moved = self.at[person]
            self._stay(thing, place, moved, fact)

    def _drop(self) -> None:
        if self.holder:
            thing = self.rng.choice(sorted(self.holder))
            person, _ = self.holder.pop(thing)
            self._say(f"{person} {self.rng.choice(DROPPED)} the {thing}{self._there()}.")

    def _give(self) -> None:
        chances = [
            (giver, thing, receiver)
            for thing, (giver, _) in sorted(self.holder.items())
            for receiver in self.persons
            if receiver != giver and receiver in self.at and self.at[receiver][0] == self.at[giver][0]
        ]
        if chances:
            giver, thing, receiver = self.rng.choice(chances)
            fact = self._say(f"{giver} {self.rng.choice(GAVE)} the {thing} to {receiver}.")
            self.holder[thing] = receiver, fact
            self.gifts.append((giver, thing, receiver, fact))

    def _there(self) -> str:
        return self.rng.choice(("", " there"))


_FOUR = ("Daniel", "John", "Mary", "Sandra")
_GIVERS = ("Bill", "Fred", "Jeff", "Mary")


def _where_is_a_person(rng: random.Random) -> Story:
    world = _World(rng, _FOUR)
    world.tell(rng.choice((2, 4, 6, 8, 10)), things=False)
    person = rng.choice(sorted(world.at))
    place, fact = world.at[person]
    return Story(tuple(world.facts), f"Where is {person}?", place, (fact,))


def _where_is_a_thing(rng: random.Random) -> Story | None:
    world = _World(rng, _FOUR)
    world.tell(rng.randint(2, 40))
    if not world.stays:
        return None
    thing = rng.choice(sorted(world.stays))
    stay = world.stays[thing][-1]
    return Story(tuple(world.facts), f"Where is the {thing}?", stay.place, stay.facts)


def _where_was_a_thing(rng: random.Random) -> Story | None:
    """Only of places that it has been to once, so that there is one place before."""
    world = _World(rng, _FOUR)
    world.tell(rng.randint(4, 32))
    choices = []
    for thing, stays in sorted(world.stays.items()):
        places = [stay.place for stay in stays]
        choices += [(thing, i) for i in range(1, len(stays)) if places.count(places[i]) == 1]
    if not choices:
        return None
    thing, i = rng.choice(choices)
    before, after = world.stays[thing][i - 1 : i + 1]
    support = tuple(sorted({*before.facts, *after.facts}))
    return Story(tuple(world.facts), f"Where was the {thing} before the {after.place}?", before.place, support)


def _where_is_a_place(rng: random.Random) -> Story:
    """Two places beside a third, each on another side of it."""
    center, *others = rng.sample(PLACES, 3)
    sides = rng.sample(sorted(OPPOSITE), 2)
    facts = []
    for other, side in zip(others, sides, strict=True):
        forms = f"The {other} is {side} of the {center}.", f"The {center} is {OPPOSITE[side]} of the {other}."
        facts.append(rng.choice(forms))
    which = rng.randrange(2)
    other, side = others[which], sides[which]
    known, side, answer = rng.choice(((center, side, other), (other, OPPOSITE[side], center)))
    question = rng.choice((f"What is {side} of the {known}?", f"What is the {known} {OPPOSITE[side]} of?"))
    return Story(tuple(facts), question, answer, (which,))


def _who_gave_what(rng: random.Random) -> Story | None:
    """Where a gift was made several times, the question is about the last time."""
    world = _World(rng, _GIVERS)
    world.tell(rng.randint(4, 40), giving=True)
    if not world.gifts:
        return None
    giver, thing, receiver, _ = rng.choice(world.gifts)
    question, answer, is_meant = rng.choice(
        (
            (f"Who gave the {thing} to {receiver}?", 0, lambda gift: gift[1:3] == (thing, receiver)),
            (f"Who gave the {thing}?", 0, lambda gift: gift[1] == thing),
            (f"Who did {giver} give the {thing} to?", 2, lambda gift: gift[:2] == (giver, thing)),
            (f"Who received the {thing}?", 2, lambda gift: gift[1] == thing),
            (f"What did {giver} give to {receiver}?", 1, lambda gift: (gift[0], gift[2]) == (giver, receiver)),
        )
    )
    meant = [gift for gift in world.gifts if is_meant(gift)][-1]
    return Story(tuple(world.facts), question, str(meant[answer]), (meant[3],))


_SHAPES: dict[str, Callable[[random.Random], Story | None]] = {
    "qa1": _where_is_a_person,
    "qa2": _where_is_a_thing,
    "qa3": _where_was_a_thing,
    "qa4": _where_is_a_place,
    "qa5": _who_gave_what,
}
SHAPES = tuple(_SHAPES)
