"""The needle tasks of RULER: sentences about magic numbers, hidden in noise, in essays, or among others like them.

From Hsieh et al. 2024, arXiv 2404.06654. The haystack is the longest that the length has room for, to the line or word.
No key and no value of a sentence that is not asked for equals one that is; where two needles or a needle and the edge
of an essay meet, there is one space, as between sentences.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from titans_data.tokenize import Tokenizer
from titans_dist.evaluation.tasks.fit import Draft, fit
from titans_dist.evaluation.tasks.sample import Sample, generator
from titans_dist.evaluation.tasks.strings import strings, words
from titans_dist.evaluation.tasks.text import Text

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percents of an essay's sentences after which a needle may lie."""


@dataclass(frozen=True)
class NeedleTask:
    """One of the eight."""

    name: str
    haystack: str = "essays"
    """noise (one group of sentences again and again), essays, or needles."""
    key: str = "word"
    value: str = "number"
    keys: int = 1
    """Needles with different keys."""
    values: int = 1
    """Needles of each key."""
    queries: int = 1
    """Keys that are asked for."""

    def sample(self, length: int, index: int, seed: int, tokenizer: Tokenizer, text: Text) -> Sample:
        """See Task."""
        rng = generator(self.name, length, index, seed)
        new_tokens = strings("needles")["new_tokens"]
        keys = _different(_DRAW[self.key], self.keys, rng)
        values = _different(_DRAW[self.value], self.keys * self.values, rng, unlike=keys)
        of_key = {key: values[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        asked = rng.sample(keys, self.queries)
        needles = [(self._needle(key, value), key in asked) for key in keys for value in of_key[key]]
        rng.shuffle(needles)
        head, tail = self._around(asked)
        place = self._in_essays(rng, text) if self.haystack == "essays" else self._among_lines(rng, {*keys, *values})

        def build(n: int) -> Draft:
            context, marks = place(n, [needle for needle, _ in needles])
            wanted = [mark for mark, (_, is_asked) in zip(marks, needles, strict=True) if is_asked]
            return Draft(head + context + tail, tuple(len(head) + mark for mark in wanted))

        found = fit(self.name, build, 1, length, new_tokens, tokenizer)
        answers = tuple(value for key in asked for value in of_key[key])
        return Sample(*(self.name, length, seed, index, found.prompt, answers, found.depths, new_tokens, found.tokens))

    def score(self, sample: Sample, output: str) -> float:
        """The share of the values that the output contains, whatever the case of their letters."""
        written = output.lower()
        return sum(answer.lower() in written for answer in sample.answers) / len(sample.answers)

    def _needle(self, key: str, value: str) -> str:
        return strings("needles")["needle"].format(kind=self.value, key=key, value=value)

    def _around(self, asked: list[str]) -> tuple[str, str]:
        """What stands before and after the context."""
        form = strings("needles")["one" if self.queries * self.values == 1 else "several"]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        head, tail = (form["prompt"] + form["answer"]).split("{context}")
        return head.format(kind=self.value), tail.format(kind=self.value, query=query)

    def _in_essays(self, rng: random.Random, text: Text) -> Callable[[int, list[str]], tuple[str, list[int]]]:
        """The first n words, with needles between their sentences."""
        depths = sorted(rng.sample(DEPTHS, self.keys * self.values))

        def place(n: int, needles: list[str]) -> tuple[str, list[int]]:
            essay = text.first(n)
            sentences = text.sentences_in(len(essay))
            parts: list[str] = []
            marks: list[int] = []
            start = size = 0
            for depth, needle in zip(depths, needles, strict=True):
                number = sentences * depth // 100
                end = text.start(number) if number < sentences else len(essay)
                before = essay[start:end].strip()
                size += len(before) + 1 if before else 0
                marks.append(size)
                size += len(needle) + 1
                parts += [before, needle]
                start = end
            parts.append(essay[start:].strip())
            return " ".join(part for part in parts if part), marks

        return place

    def _among_lines(self, rng: random.Random, taken: set[str]) -> Callable[[int, list[str]], tuple[str, list[int]]]:
        """n lines, the needle before one of them."""
        where = rng.random()
        lines: list[str] = []
        more = self._lines(random.Random(rng.getrandbits(64)), taken)

        def place(n: int, needles: list[str]) -> tuple[str, list[int]]:
            (needle,) = needles
            lines.extend(next(more) for _ in range(n - len(lines)))
            before = "".join(line + "\n" for line in lines[: int(where * n)])
            return before + "\n".join([needle, *lines[int(where * n) : n]]), [len(before)]

        return place

    def _lines(self, rng: random.Random, taken: set[str]) -> Iterator[str]:
        while True:
            if self.haystack == "noise":
                yield strings("needles")["noise"]
            else:
                (key,) = _different(_DRAW[self.key], 1, rng, taken)
                (value,) = _different(_DRAW[self.value], 1, rng, taken)
                yield self._needle(key, value)


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _word(rng: random.Random) -> str:
    return f"{rng.choice(words('adjectives'))}-{rng.choice(words('nouns'))}"


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAW = {"number": _number, "word": _word, "uuid": _uuid}


def _different(
    draw: Callable[[random.Random], str], how_many: int, rng: random.Random, unlike: Container[str] = ()
) -> list[str]:
    """So many, each unlike the others."""
    found: list[str] = []
    while len(found) < how_many:
        one = draw(rng)
        if one not in found and one not in unlike:
            found.append(one)
    return found


NEEDLE_TASKS = (
    NeedleTask("niah_single_1", haystack="noise"),
    NeedleTask("niah_single_2"),
    NeedleTask("niah_single_3", value="uuid"),
    NeedleTask("niah_multikey_1", keys=4),
    NeedleTask("niah_multikey_2", haystack="needles"),
    NeedleTask("niah_multikey_3", haystack="needles", key="uuid", value="uuid"),
    NeedleTask("niah_multivalue", values=4),
    NeedleTask("niah_multiquery", keys=4, queries=4),
)
