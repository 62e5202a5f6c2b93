"""The pass key and associative recall."""

from __future__ import annotations

import re

import pytest

from tests.evaluation.tasks.helpers import ESSAY, Words, golden
from titans_data.tokenize import BytesTokenizer
from titans_dist.evaluation.tasks import Sample, tasks
from titans_dist.evaluation.tasks.strings import words

PASSKEY, MQAR = tasks()["passkey"], tasks()["mqar"]


def test_a_pass_key_prompt_is_the_published_text() -> None:
    form = golden("passkey")
    length = len(form.split()) + 10
    prompts = [PASSKEY.sample(length, index, 42, Words(), ESSAY) for index in range(50)]
    assert any(found.prompt == form.format(value=found.answers[0]) for found in prompts)


def test_the_pass_key_is_anywhere_between_the_groups() -> None:
    places = set()
    for index in range(100):
        found = PASSKEY.sample(300, index, 42, Words(), ESSAY)
        (key,) = found.answers
        assert 1 <= int(key) <= 50_000
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        before = found.prompt.partition(needle)[0]
        assert len(re.findall(rf"\b{key}\b", found.prompt)) == 2
        assert found.depths[0] == pytest.approx(len(before.split()) / found.tokens, abs=1e-6)
        places.add(before.count("The grass is green"))
    groups = found.prompt.count("The grass is green")
    assert places == set(range(groups + 1))


@pytest.mark.parametrize(
    ("output", "score"),
    [
        (" 4711.", 1),
        ("04711", 1),
        ("4711", 1),
        ("\n4711 and 12", 1),
        ("47110", 0),
        ("12, 4711", 0),
        ("four", 0),
        ("", 0),
    ],
)
def test_the_first_number_must_be_the_pass_key(output: str, score: float) -> None:
    assert PASSKEY.score(Sample("passkey", 0, 0, 0, "", ("4711",), (), 16, 0), output) == score


@pytest.mark.parametrize("index", range(10))
def test_recall_has_pairs_then_noise_then_queries(index: int) -> None:
    found = MQAR.sample(400, index, 42, Words(), ESSAY)
    *lines, last = found.prompt.split("\n")
    pairs, noise, queries = lines[:16], lines[16:-3], lines[-3:]
    value_of = dict(pair.split(": ") for pair in pairs)
    assert len(value_of) == len(set(value_of.values())) == 16
    assert set(value_of) <= set(words("nouns")) and set(value_of.values()) <= set(words("adjectives"))
    assert not set(value_of) & set(value_of.values())
    assert not set(noise) & {*value_of, *value_of.values()}
    assert len(noise) > 300 and all(word.isalpha() for word in noise)
    assert set(queries) <= set(pairs) and len(set(queries)) == 3
    key = last.removesuffix(":")
    assert found.answers == (value_of[key],)
    assert f"{key}: {value_of[key]}" not in queries, "the answer would be nearer than its pair"
    assert found.depths == pytest.approx([2 * list(value_of).index(key) / found.tokens], abs=1e-6)
    assert found.tokens + found.new_tokens == 400


def test_recall_leaves_room_for_the_longest_word() -> None:
    found = MQAR.sample(1000, 0, 42, BytesTokenizer(), ESSAY)
    assert found.new_tokens > len(f" {found.answers[0]}")


@pytest.mark.parametrize(
    ("output", "score"),
    [(" bold", 1), ("bold\nriver", 1), (" Bold.", 1), (" bolder", 0), ("river bold", 0), ("", 0), ("?", 0)],
)
def test_the_first_word_must_be_the_value(output: str, score: float) -> None:
    assert MQAR.score(Sample("mqar", 0, 0, 0, "", ("bold",), (), 4, 0), output) == score
