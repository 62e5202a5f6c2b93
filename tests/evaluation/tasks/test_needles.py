"""RULER's needle tasks: the text of the definition, one needle where it is said to be, and the published scores."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.tasks.helpers import ESSAY, Words, golden
from titans_dist.evaluation.tasks import Sample, TaskDoesNotFit, Text, tasks

NAMES = [name for name in tasks() if name.startswith("niah_")]
NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.")
LONG = Text(" ".join(f"Sentence {i} says that {i} squared is {i * i}." for i in range(400)))


def sample(name: str, length: int, index: int = 0, text: Text = LONG) -> Sample:
    return tasks()[name].sample(length, index, 42, Words(), text)


def test_there_are_eight() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_published_text(name: str) -> None:
    """Of many samples of the golden file's length, one has its needles where the file has them, and equals it."""
    form = golden(name)
    length = len(form.split()) + 128
    for index in range(4000):
        found = sample(name, length, index, ESSAY)
        keys, values = zip(*NEEDLE.findall(found.prompt), strict=True)
        asked = found.prompt.rpartition(" for ")[2].partition(" mentioned")[0].replace(" and ", " ").split(", ")
        if form.format(keys=keys, values=values, asked=asked) == found.prompt:
            return
    pytest.fail(f"no sample equals the golden file; the last one is\n{found.prompt}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", range(5))
def test_needles_lie_where_the_sample_says(name: str, index: int) -> None:
    found = sample(name, 1500, index)
    needles = {value: match for match in NEEDLE.finditer(found.prompt) for value in [match[2]]}
    tokens = found.prompt.split()
    assert found.tokens == len(tokens)
    places = sorted(needles[answer].start() for answer in found.answers)  # KeyError: the answer is not there
    before = [len(found.prompt[:place].split()) for place in places]
    assert found.depths == pytest.approx([number / len(tokens) for number in before], abs=1e-6)
    question = found.prompt.rpartition("\n")[2]
    for answer in found.answers:
        needle = needles[answer]
        assert found.prompt.count(needle[0]) == 1
        assert needle[1] in question.partition("?")[0] and needle[1] in question.partition("?")[2]
        assert answer not in question


def counts(name: str) -> tuple[int, int, int]:
    return {"niah_multikey_1": (4, 4, 1), "niah_multivalue": (1, 4, 4), "niah_multiquery": (4, 4, 4)}.get(
        name, (1, 1, 1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_so_many_keys_needles_and_answers(name: str) -> None:
    found = sample(name, 1500)
    keys, needles, answers = counts(name)
    pairs = NEEDLE.findall(found.prompt)
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert len(pairs) > 80
    else:
        assert (len({key for key, _ in pairs}), len(pairs)) == (keys, needles)
    assert len(set(found.answers)) == len(found.answers) == answers
    asked = found.prompt.rpartition("\n")[2].partition("?")[0]
    of_others = {value for key, value in pairs if key not in asked}
    assert not of_others & set(found.answers)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_of_the_kind_of_the_task(name: str) -> None:
    for key, value in NEEDLE.findall(sample(name, 1000).prompt):
        if name in ("niah_single_3", "niah_multikey_3"):
            assert uuid.UUID(value).version == 4 and str(uuid.UUID(value)) == value
        else:
            assert re.fullmatch("[1-9][0-9]{6}", value)
        if name == "niah_multikey_3":
            assert uuid.UUID(key).version == 4
        else:
            assert re.fullmatch("[a-z]+-[a-z]+", key)


def test_an_essay_keeps_its_words_and_needles_stand_between_sentences() -> None:
    for index in range(30):
        prompt = sample("niah_single_2", 700, index).prompt
        context = prompt.split("\n")[1]
        needle = NEEDLE.search(context)
        assert needle is not None
        before, after = context[: needle.start()], context[needle.end() :]
        assert LONG.first(10_000).startswith((before + after.lstrip() if before else after.lstrip()).strip())
        assert before == "" or before.endswith(". ")


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_that_are_asked_for_are_those_of_no_other_needle(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where there are only eight of each kind, so that drawing at random would give many twice."""
    few = {kind: lambda rng, kind=kind: f"{kind}{rng.randrange(8)}" for kind in ("word", "number", "uuid")}
    monkeypatch.setattr("titans_dist.evaluation.tasks.needles._DRAW", few)
    for index in range(10):
        found = sample(name, 500, index)
        needles = re.findall(r"magic \w+ for (\S+) is: (\S+)\.", found.prompt)
        asked = found.prompt.rpartition("\n")[2].partition("?")[0]
        values = [value for key, value in needles if key in asked]
        assert sorted(values) == sorted(set(found.answers)) and len(values) == len(found.answers)
        assert len([value for _, value in needles if value in found.answers]) == len(found.answers)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2"])
def test_a_needle_stands_before_any_line_and_never_after_the_last(name: str) -> None:
    form = golden(name)
    places, lines = set(), set()
    for index in range(200):
        found = sample(name, len(form.split()) + 128, index)
        context = found.prompt.split("\n")[1:-1]
        (place,) = [i for i, line in enumerate(context) if found.answers[0] in line]
        places.add(place)
        lines.add(len(context))
    assert (places, lines) == (set(range(len(form.split("\n")) - 3)), {len(form.split("\n")) - 2})


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery"])
def test_needles_are_in_any_order(name: str) -> None:
    found = [sample(name, 700, index) for index in range(20)]
    ordered = [list(one.answers) == sorted(one.answers, key=one.prompt.index) for one in found]
    assert sum(ordered) < 10


def test_all_depths_of_an_essay_occur_and_no_others() -> None:
    """0, 3, 5, 8, ... 100 percent of the sentences."""
    seen = set()
    for index in range(400):
        context = sample("niah_single_2", 700, index).prompt.split("\n")[1]
        before, _, after = context.partition("One of the special")
        total = before.count("Sentence") + after.count("Sentence")
        seen.add((before.count("Sentence"), total))
    percents = [round(100 * i / 39) for i in range(40)]
    assert seen <= {(total * percent // 100, total) for _, total in seen for percent in percents}
    assert len({place for place, _ in seen}) > 30


def test_an_essay_that_is_too_short_begins_again() -> None:
    found = sample("niah_single_2", 400, text=ESSAY)
    assert found.tokens + 128 == 400
    assert found.prompt.count("A cat sat down.") > 5


@pytest.mark.parametrize("name", NAMES)
def test_the_least_length_that_works_is_named(name: str) -> None:
    with pytest.raises(TaskDoesNotFit, match=f"{name} does not fit into 100 tokens") as caught:
        sample(name, 100)
    least = caught.value.least
    assert str(least) in str(caught.value)
    found = sample(name, least)  # of one token a key and a value, so every sample needs the same
    assert found.tokens + found.new_tokens <= least
    with pytest.raises(TaskDoesNotFit):
        sample(name, least - 1)


@pytest.mark.parametrize(
    ("answers", "output", "score"),
    [
        (("1234567",), " 1234567.", 1),
        (("1234567",), "12345678", 1),
        (("1234567",), "1,234,567", 0),
        (("1234567",), "", 0),
        (("5ab0c1de-0000-4000-8000-000000000000",), "5AB0C1DE-0000-4000-8000-000000000000", 1),
        (("1111111", "2222222", "3333333", "4444444"), "4444444, 1111111 and 3333330", 0.5),
        (("1111111", "2222222", "3333333", "4444444"), "1111111 2222222 3333333 4444444", 1),
    ],
)
def test_the_score_is_the_share_of_values_in_the_output(answers: tuple[str, ...], output: str, score: float) -> None:
    asked = Sample("niah_multivalue", 0, 0, 0, "", answers, (), 128, 0)
    assert tasks()["niah_multivalue"].score(asked, output) == score


@given(
    answers=st.lists(st.from_regex("[1-9][0-9]{6}", fullmatch=True), min_size=1, max_size=4, unique=True),
    keep=st.integers(0, 15),
    noise=st.text("abc \n.,", max_size=20),
)
def test_every_value_counts_the_same_wherever_it_stands(answers: list[str], keep: int, noise: str) -> None:
    written = [answer for i, answer in enumerate(answers) if keep >> i & 1]
    output = noise + f" {noise} ".join(reversed(written)) + noise
    asked = Sample("niah_multiquery", 0, 0, 0, "", tuple(answers), (), 128, 0)
    assert tasks()["niah_multiquery"].score(asked, output) == len(written) / len(answers)
