"""Grade-school word problems from a seed: a page of facts, a question, a worked answer.

Every problem states many facts about many people and asks about a few of them, so that the answer cannot be had
without the context; the numbers are drawn anew each time, so that no answer is more than a few per cent likely.
`FAMILIES` is what the embedded model is trained on, `NEW_FAMILIES` what it has never seen and is fine-tuned on.

Two things are held out of the "train" split: one combination of deciding numbers in five, by its hash, which the
"test" split is made of; and the last phrasing of every sentence, which "rephrased" uses on top.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from elision.errors import InputError

Split = Literal["train", "test", "rephrased"]
SPLITS: tuple[Split, ...] = get_args(Split)

NAMES: list[str] = str.split(
    "Ada Alan Amos Anna Asa Beth Boris Carl Cora Dana Dora Edith Elmer Emma Enid Erik Eva Faye Felix Finn Flora Fred "
    "Gina Greta Gus Hana Hugo Ida Igor Inga Ivan Jack Jade Jonas Judy Julia Karl Kate Lars Lena Leo Lily Lola Lucas "
    "Mara Mark Maya Milo Mona Nadia Nils Nina Nora Olaf Olga Omar Oscar Otto Owen Paula Petra Piet Rosa Rufus Ruth "
    "Sara Saul Selma Sonia Stan Tara Theo Tina Tom Ulla Uma Vera Viktor Wanda Wilma Yara Yuri Zara Zeno"
)
THINGS: list[str] = str.split(
    "apples bags balls beads bells books bottles boxes bricks buttons cakes candles cards chairs coins cups drums eggs "
    "figs flags forks hats jars keys kites lamps lemons maps marbles masks nails nuts pans pears pencils pens pins "
    "plates plums pots ribbons rings ropes seeds shells shirts spoons stamps stones tents toys"
)


@dataclass(frozen=True)
class Problem:
    """One word problem. `prompt` + " " + `solution` is the training text; only the solution carries loss."""

    family: str
    facts: tuple[str, ...]
    question: str
    solution: str  # worked, ending in "#### answer"
    answer: str

    @property
    def prompt(self) -> str:
        """Facts, question and the cue for the answer."""
        return " ".join(self.facts) + f"\nQuestion: {self.question}\nAnswer:"

    def with_facts_of(self, other: Problem) -> Problem:
        """The same question over another problem's facts: what remains answerable shows what was not read."""
        return Problem(self.family, other.facts, self.question, self.solution, self.answer)


class _Writer:
    """Draws names, things, numbers and phrasings for one problem of one split."""

    def __init__(self, rng: random.Random, split: Split, distractors: tuple[int, int]) -> None:
        self.rng = rng
        self.split = split
        self.kept = distractors
        self.people = rng.sample(NAMES, 12)
        self.things = rng.sample(THINGS, 6)

    def phrase(self, *phrasings: str, held_out: int = 1, **slots: object) -> str:
        """One of the phrasings, filled in; the last `held_out` of them belong to the split "rephrased" alone."""
        pool = phrasings[-held_out:] if self.split == "rephrased" else phrasings[:-held_out]
        return self.rng.choice(pool).format(**slots)

    def numbers(
        self, *ranges: tuple[int, int], of: str = "", where: Callable[..., bool] = lambda *_: True
    ) -> list[int]:
        """One number per inclusive range, satisfying `where` and, together with whose they are, of this split.

        The hash mixes all digits: held out are combinations, never a number, a digit or a pair of last digits, which
        nobody could then learn to add.
        """
        while True:
            drawn = [self.rng.randint(low, high) for low, high in ranges]
            held_out = zlib.crc32(f"{of} {drawn}".encode()) % 5 == 0
            if where(*drawn) and held_out == (self.split != "train"):
                return drawn

    def possession(self, who: str, number: int, thing: str) -> str:
        return self.phrase(
            "{who} has {number} {thing}.",
            "{who} owns {number} {thing}.",
            "{who} keeps {number} {thing} in a drawer.",
            "In {who}'s bag there are {number} {thing}.",
            "On the table of {who} there are {number} {thing}.",
            "In the drawer of {who} there are {number} {thing}.",
            who=who,
            number=number,
            thing=thing,
        )

    def distractors(self, people: list[str], number: int) -> list[str]:
        """What other people have: one possession for each of `number` of them."""
        return [
            self.possession(who, self.rng.randint(2, 40), self.rng.choice(self.things))
            for who in self.rng.sample(people, number)
        ]

    def place(self, facts: list[str], among: list[str]) -> tuple[str, ...]:
        """Facts in their own order at random places among the distractors, of which training drops some."""
        if self.split == "train":
            among = among[: self.rng.randint(min(self.kept[0], len(among)), min(self.kept[1], len(among)))]
        places = sorted(self.rng.sample(range(len(facts) + len(among)), len(facts)))
        mixed = list(among)
        for place, fact in zip(places, facts, strict=True):
            mixed.insert(place, fact)
        return tuple(mixed)


def _lookup(w: _Writer) -> Problem:
    a, thing = w.people[0], w.things[0]
    (n,) = w.numbers((2, 40), of=a)
    facts = [w.possession(a, n, thing)]
    noise = w.distractors(w.people[1:], 10)
    question = w.phrase(
        "How many {t} does {a} have?",
        "What is the number of {t} that {a} has?",
        "Count the {t} of {a}.",
        "What is the number of {t} of {a}?",
        a=a,
        t=thing,
    )
    return Problem("lookup", w.place(facts, noise), question, f"{a} has {n} {thing}. #### {n}", str(n))


def _change(w: _Writer, family: str, sign: int, *events: str) -> Problem:
    n, k = w.numbers((4, 40), (2, 20), where=lambda n, k: n + sign * k > 0)
    a, thing = w.people[0], w.things[0]
    noise = w.distractors(w.people[1:], 9)
    event = w.phrase(*events, a=a, k=k, t=thing)
    question = w.phrase(
        "How many {t} does {a} have now?",
        "After that, how many {t} does {a} have?",
        "What is the number of {t} that {a} has in the end?",
        "In the end, how many {t} does {a} have?",
        a=a,
        t=thing,
    )
    end = n + sign * k
    text = f"{a} had {n} {thing}. {n} {'+' if sign > 0 else '-'} {k} = {end}. #### {end}"
    return Problem(family, w.place([w.possession(a, n, thing), event], noise), question, text, str(end))


def _gain(w: _Writer) -> Problem:
    return _change(
        w,
        "gain",
        1,
        "Then {a} finds {k} more {t}.",
        "Later {a} gets {k} more {t}.",
        "{a} buys another {k} {t}.",
        "Later {a} buys {k} more {t}.",
    )


def _loss(w: _Writer) -> Problem:
    return _change(
        w,
        "loss",
        -1,
        "Then {a} loses {k} {t}.",
        "Later {a} gives {k} {t} away.",
        "{a} sells {k} {t}.",
        "Later {a} loses {k} {t}.",
    )


def _sum(w: _Writer) -> Problem:
    n, m = w.numbers((2, 40), (2, 20))
    a, b, thing = w.people[0], w.people[1], w.things[0]
    noise = w.distractors(w.people[2:], 9)
    facts = [w.possession(a, n, thing), w.possession(b, m, thing)]
    w.rng.shuffle(facts)
    question = w.phrase(
        "How many {t} do {a} and {b} have together?",
        "{a} and {b} put their {t} together. How many are there?",
        "What is the total number of {t} of {a} and {b}?",
        "How many {t} are there when {a} and {b} put theirs together?",
        a=a,
        b=b,
        t=thing,
    )
    text = f"{a} has {n} {thing}. {b} has {m} {thing}. {n} + {m} = {n + m}. #### {n + m}"
    return Problem("sum", w.place(facts, noise), question, text, str(n + m))


def _difference(w: _Writer) -> Problem:
    n, m = w.numbers((4, 40), (2, 20), where=lambda n, m: n > m)
    a, b, thing = w.people[0], w.people[1], w.things[0]
    noise = w.distractors(w.people[2:], 9)
    facts = [w.possession(a, n, thing), w.possession(b, m, thing)]
    w.rng.shuffle(facts)
    question = w.phrase(
        "How many more {t} does {a} have than {b}?",
        "{a} has more {t} than {b}. How many more?",
        "How many {t} is {b} short of {a}?",
        "By how many {t} does {a} have more than {b}?",
        a=a,
        b=b,
        t=thing,
    )
    text = f"{a} has {n} {thing}. {b} has {m} {thing}. {n} - {m} = {n - m}. #### {n - m}"
    return Problem("difference", w.place(facts, noise), question, text, str(n - m))


def _relation(w: _Writer) -> Problem:
    n, k = w.numbers((6, 40), (2, 20), where=lambda n, k: n > k)
    a, b, thing = w.people[0], w.people[1], w.things[0]
    more = w.rng.random() < 0.5
    total = n + k if more else n - k
    relation = w.phrase(
        "{b} has {k} {more} {t} than {a}.",
        "Compared with {a}, {b} has {k} {more} {t}.",
        "{b} owns {k} {more} {t} than {a}.",
        "Compared with {a}, {b} owns {k} {more} {t}.",
        a=a,
        b=b,
        k=k,
        t=thing,
        more="more" if more else "fewer",
    )
    noise = w.distractors(w.people[2:], 9)
    facts = [w.possession(a, n, thing), relation]
    w.rng.shuffle(facts)
    question = w.phrase(
        "How many {t} does {b} have?",
        "What is the number of {t} that {b} has?",
        "Count the {t} of {b}.",
        "What is the number of {t} of {b}?",
        b=b,
        t=thing,
    )
    text = f"{a} has {n} {thing}. {n} {'+' if more else '-'} {k} = {total}. #### {total}"
    return Problem("relation", w.place(facts, noise), question, text, str(total))


def _price(w: _Writer) -> Problem:
    p, c = w.numbers((3, 40), (2, 3))
    a, thing = w.people[0], w.things[0]
    prices = [(thing, p)] + [(other, w.rng.randint(3, 40)) for other in w.things[1:]]
    noise = [
        w.phrase(
            "One of the {t} costs {p} dollars.",
            "The price of {t} is {p} dollars each.",
            "The {t} sell at {p} dollars each.",
            "The {t} cost {p} dollars each.",
            t=t,
            p=n,
        )
        for t, n in prices
    ] + w.distractors(w.people[1:], 5)
    cost, noise = noise[0], noise[1:]
    w.rng.shuffle(noise)
    order = w.phrase(
        "{a} buys {c} {t}.",
        "{a} wants {c} {t}.",
        "{a} takes {c} {t} home.",
        "{a} takes {c} {t}.",
        a=a,
        c=c,
        t=thing,
    )
    question = w.phrase(
        "How many dollars does {a} pay?",
        "What does {a} have to pay?",
        "What is the bill of {a} in dollars?",
        "How many dollars does {a} have to pay?",
        a=a,
    )
    sums = " ".join(f"{p * times} + {p} = {p * (times + 1)}." for times in range(1, c))
    text = f"{a} takes {c} {thing}. They cost {p} dollars each. {sums} #### {p * c}"
    facts = [order, cost]
    w.rng.shuffle(facts)
    return Problem("price", w.place(facts, noise), question, text, str(p * c))


def _ages(w: _Writer) -> Problem:
    n, k, m = w.numbers((14, 40), (2, 10), (2, 10))
    a, b = w.people[:2]
    older = w.rng.random() < 0.5
    now = n + k if older else n - k
    relation = w.phrase(
        "{b} is {k} years {older} than {a}.",
        "Compared with {a}, {b} is {k} years {older}.",
        "{k} years {older} than {a} is what {b} is.",
        "Compared with {a}, {b} is {older} by {k} years.",
        a=a,
        b=b,
        k=k,
        older="older" if older else "younger",
    )
    ages = [(a, n)] + [(who, w.rng.randint(12, 40)) for who in w.people[2:10]]
    said = [
        w.phrase(
            "{who} is {n} years old.",
            "The age of {who} is {n}.",
            "{who} turned {n} this year.",
            "{who} has turned {n} this year.",
            who=who,
            n=number,
        )
        for who, number in ages
    ]
    noise = said[1:] + w.distractors(w.people[10:], 2)
    w.rng.shuffle(noise)
    facts = [said[0], relation]
    w.rng.shuffle(facts)
    question = w.phrase(
        "How old will {b} be in {m} years?",
        "What will the age of {b} be {m} years from now?",
        "In {m} years, how old is {b}?",
        "{m} years from now, how old will {b} be?",
        b=b,
        m=m,
    )
    text = f"{a} is {n}. {b} is {n} {'+' if older else '-'} {k} = {now}. {now} + {m} = {now + m}. #### {now + m}"
    return Problem("ages", w.place(facts, noise), question, text, str(now + m))


def _trips(w: _Writer) -> Problem:
    n, m = w.numbers((5, 40), (4, 20))
    a, b, c = w.people[:3]
    legs = [(a, b, n), (b, c, m)]
    legs += [(x, w.rng.choice([y for y in w.people if y != x]), w.rng.randint(4, 40)) for x in w.people[2:11]]
    said = [
        w.phrase(
            "The walk from {x}'s house to {y}'s house takes {n} minutes.",
            "From {x} to {y} it is {n} minutes.",
            "On foot {x} to {y} takes {n} minutes.",
            "From {x} to {y} the walk takes {n} minutes.",
            x=x,
            y=y,
            n=number,
        )
        for x, y, number in legs
    ]
    facts, noise = said[:2], said[2:]
    w.rng.shuffle(facts)
    question = w.phrase(
        "How many minutes is it from {a} to {c} by way of {b}?",
        "Going from {a} to {b} and on to {c}, how many minutes does one walk?",
        "How long is the way from {a} over {b} to {c}?",
        "How many minutes does one walk from {a} over {b} to {c}?",
        a=a,
        b=b,
        c=c,
    )
    text = f"{a} to {b} is {n}. {b} to {c} is {m}. {n} + {m} = {n + m}. #### {n + m}"
    return Problem("trips", w.place(facts, noise), question, text, str(n + m))


def _bus(w: _Writer) -> Problem:
    n, k, m = w.numbers((4, 24), (2, 16), (2, 20), where=lambda n, k, m: n + k > m)
    said = [
        w.phrase(
            "A bus starts with {n} people.",
            "A bus leaves the station with {n} people.",
            "At the station {n} people sit in a bus.",
            "A bus leaves with {n} people.",
            n=n,
        ),
        w.phrase(
            "At the market {k} people get on.",
            "At the school {k} more people get on.",
            "Then {k} people get on.",
            "At the bridge {k} people get on.",
            k=k,
        ),
        w.phrase(
            "Later {m} people get off.",
            "At the park {m} people get off.",
            "Near the river {m} of them get off.",
            "At the church {m} people get off.",
            m=m,
        ),
    ]
    question = w.phrase(
        "How many people are in the bus at the end?",
        "After that, how many people does the bus carry?",
        "What is the number of people in the bus now?",
        "How many people does the bus carry at the end?",
    )
    on, left = n + k, n + k - m
    text = f"The bus had {n}. {n} + {k} = {on}. {on} - {m} = {left}. #### {left}"
    return Problem("bus", w.place(said, w.distractors(w.people, 8)), question, text, str(left))


FAMILIES: dict[str, Callable[[_Writer], Problem]] = {
    "lookup": _lookup,
    "gain": _gain,
    "loss": _loss,
    "sum": _sum,
    "difference": _difference,
    "relation": _relation,
    "price": _price,
}
NEW_FAMILIES: dict[str, Callable[[_Writer], Problem]] = {"ages": _ages, "bus": _bus, "trips": _trips}


def problem(
    families: tuple[str, ...], split: Split, index: int, seed: int = 0, distractors: tuple[int, int] = (3, 99)
) -> Problem:
    """Problem number `index` of a seed and split, its family drawn evenly from `families`.

    `distractors` bounds how many facts beside the point a training problem keeps: short pages teach to look things
    up, long ones to do it among many. The other splits' pages are always long.

    Raises:
        InputError: an unknown family or split.
    """
    known = FAMILIES | NEW_FAMILIES
    for family in families:
        if family not in known:
            raise InputError(f"family {family!r} is not a problem family: take one of {', '.join(known)}")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not known: use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{split}/{index}")
    return known[rng.choice(families)](_Writer(rng, split, distractors))


def problems(families: tuple[str, ...], split: Split, number: int, seed: int = 0) -> list[Problem]:
    """Problems 0 to `number` - 1 of a seed and split."""
    return [problem(families, split, index, seed) for index in range(number)]


def majority_rate(sample: list[Problem]) -> float:
    """The accuracy of always giving the sample's commonest answer."""
    answers = [problem.answer for problem in sample]
    return max(answers.count(answer) for answer in set(answers)) / len(answers)
