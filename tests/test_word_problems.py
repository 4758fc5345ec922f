"""The generator: seeded, answerable from its facts and only from them, and split cleanly."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from elision.errors import InputError
from elision.word_problems import FAMILIES, NAMES, NEW_FAMILIES, SPLITS, Problem, majority_rate, problem, problems

ALL = (*FAMILIES, *NEW_FAMILIES)


def solve(p: Problem) -> int:
    """The answer from the facts alone, by other means than the generator's."""
    text = " ".join(p.facts)
    names = [word for word in re.findall(r"[A-Z][a-z]+", p.question) if word in NAMES]

    def owned(who: str, thing: str) -> int:
        patterns = (
            rf"{who} (?:has|owns|keeps) (\d+) {thing}",
            rf"(?:In {who}'s bag|On the table of {who}|In the drawer of {who}) there are (\d+) {thing}",
        )
        found = [int(n) for pattern in patterns for n in re.findall(pattern, text)]
        assert len(found) == 1, (who, thing, found)
        return found[0]

    if p.family == "price":
        buyer = names[0]
        ((count, thing),) = re.findall(rf"{buyer} (?:buys|wants|takes) (\d+) (\w+)", text)
        price = re.findall(rf"(?:{thing} costs?|of {thing} is|{thing} sell at) (\d+)", text)
        assert len(price) == 1
        return int(count) * int(price[0])
    if p.family == "trips":
        a, b, c = names if "by way of" not in p.question else (names[0], names[2], names[1])

        def leg(x: str, y: str) -> int:
            forms = (
                rf"{x}'s house to {y}'s house takes (\d+)",
                rf"(?:From|foot) {x} to {y} (?:it is|takes|the walk takes) (\d+)",
            )
            found = [int(n) for form in forms for n in re.findall(form, text)]
            assert len(found) == 1
            return found[0]

        return leg(a, b) + leg(b, c)
    if p.family == "bus":
        (begin,) = re.findall(r"with (\d+) people|station (\d+) people sit", text)
        (on,) = re.findall(r"(\d+) (?:more )?people get on", text)
        (off,) = re.findall(r"(\d+) (?:people|of them) get off", text)
        return int("".join(begin)) + int(on) - int(off)
    if p.family == "ages":
        who = names[0]
        years = int(re.findall(r"\d+", p.question)[0])
        relation = next(f for f in p.facts if who in f and re.search(r"older|younger", f))
        other = next(n for n in re.findall(r"[A-Z][a-z]+", relation) if n not in (who, "Compared"))
        shift = int(re.findall(r"\d+", relation)[0]) * (1 if "older" in relation else -1)
        (age,) = re.findall(rf"{other} is (\d+) years old|age of {other} is (\d+)|{other} (?:has )?turned (\d+)", text)
        return int("".join(age)) + shift + years
    thing = next(word for word in re.findall(r"[a-z]+", p.question) if re.search(rf"\d+ (?:more )?{word}\b", text))
    if p.family == "lookup":
        return owned(names[0], thing)
    if p.family in ("gain", "loss"):
        (change,) = re.findall(rf"(?:finds|gets|buys|loses|gives|sells)(?: another)? (\d+)(?: more)? {thing}", text)
        return owned(names[0], thing) + int(change) * (1 if p.family == "gain" else -1)
    if p.family == "sum":
        return owned(names[0], thing) + owned(names[1], thing)
    if p.family == "difference":
        return abs(owned(names[0], thing) - owned(names[1], thing))
    relation = next(f for f in p.facts if re.search(r"more|fewer", f))
    other = next(n for n in re.findall(r"[A-Z][a-z]+", relation) if n not in (names[0], "Compared"))
    shift = int(re.findall(r"\d+", relation)[0]) * (1 if "more" in relation else -1)
    return owned(other, thing) + shift


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("split", SPLITS)
def test_the_facts_hold_the_answer(family: str, split: str) -> None:
    for p in problems((family,), split, 60):  # pyright: ignore
        assert str(solve(p)) == p.answer
        assert p.solution.endswith(f"#### {p.answer}")
        for left, sign, right, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", p.solution):
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                result
            )


def test_the_solver_notices_facts_of_another_problem() -> None:
    asked, other = problems(("sum",), "test", 2)
    misled = asked.with_facts_of(other)
    assert misled.question == asked.question and misled.facts == other.facts != asked.facts
    with pytest.raises((AssertionError, StopIteration)):
        solve(misled)
    wrong = replace(asked, facts=tuple(re.sub(r"\d+", "1", fact) for fact in asked.facts))
    assert str(solve(wrong)) != asked.answer


def test_a_problem_depends_on_seed_split_and_index_alone() -> None:
    assert problem(("sum", "ages"), "train", 7, seed=3) == problems(("sum", "ages"), "train", 9, seed=3)[7]
    assert problem(("sum",), "train", 7, seed=3) != problem(("sum",), "train", 7, seed=4)
    assert problem(("sum",), "train", 7, seed=3) != problem(("sum",), "test", 7, seed=3)


@pytest.mark.parametrize("family", ALL)
def test_phrasings_and_numbers_are_held_out(family: str) -> None:
    def shape(sentence: str) -> str:
        return re.sub(r"\d+", "#", re.sub(r"\b[A-Z][a-z]+(?='s|\b)", "N", sentence))

    train, test, rephrased = (problems((family,), split, 200) for split in SPLITS)
    shapes = [{shape(p.question) for p in split} for split in (train, test, rephrased)]
    assert not shapes[0] & shapes[2] and shapes[0] & shapes[1]


@pytest.mark.parametrize("family", ALL)
def test_combinations_are_held_out_and_digits_are_not(family: str) -> None:
    def operands(split: str) -> set[tuple[str, ...]]:
        whose = r"\d+|^[A-Z][a-z]+" if family == "lookup" else r"\d+"  # one number alone is held out for some people
        return {tuple(re.findall(whose, p.solution)) for p in problems((family,), split, 1000)}  # pyright: ignore

    train, test, rephrased = map(operands, SPLITS)
    assert not train & (test | rephrased)
    assert {word[-1] for combination in test for word in combination} <= {
        word[-1] for combination in train for word in combination
    }
    # What two last digits add up to must have been seen: otherwise nobody could learn to add.
    pairs = [{tuple(word[-1] for word in c if word.isdigit())[:2] for c in split} for split in (train, test)]
    assert len(pairs[1] - pairs[0]) <= 0.02 * len(pairs[1])


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_no_answer_is_common(family: str) -> None:
    assert majority_rate(problems((family,), "test", 500)) < 0.08


def test_bad_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"family 'sums' .* take one of lookup"):
        problems(("sums",), "train", 1)
    with pytest.raises(InputError, match=r"split 'dev' is not known"):
        problems(("sum",), "dev", 1)  # pyright: ignore
