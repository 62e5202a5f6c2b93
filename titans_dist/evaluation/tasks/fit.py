"""The longest prompt that a length has room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from titans_data.tokenize import Tokenizer
from titans_dist.evaluation.tasks.sample import TaskDoesNotFit


@dataclass(frozen=True)
class Draft:
    """A prompt, and where in it the things begin that the answer rests on."""

    prompt: str
    marks: tuple[int, ...]
    """Characters before each, in the order of the prompt."""


@dataclass(frozen=True)
class Fitted:
    """The prompt that was chosen."""

    prompt: str
    depths: tuple[float, ...]
    tokens: int


def count(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text."""
    return len(tokenizer.encode_batch([text])[0])


def fit(
    task: str, build: Callable[[int], Draft], least: int, length: int, new_tokens: int, tokenizer: Tokenizer
) -> Fitted:
    """Of the prompts build(n), n >= least pieces of haystack, the longest with tokens + new_tokens <= length.

    That is: build(n) fits and build(n + 1) does not. Raises TaskDoesNotFit where build(least) does not.
    """
    room = length - new_tokens

    def measure(n: int) -> int:
        return count(tokenizer, build(n).prompt)

    size = measure(least)
    if size > room:
        raise TaskDoesNotFit(task, length, size + new_tokens)
    draft = build(largest(measure, least, size, room))
    before, seen, start = [], 0, 0
    for mark in draft.marks:
        seen += count(tokenizer, draft.prompt[start:mark])
        before.append(seen)
        start = mark
    tokens = count(tokenizer, draft.prompt)
    return Fitted(draft.prompt, tuple(round(number / tokens, 6) for number in before), tokens)


def largest(measure: Callable[[int], int], low: int, size: int, room: int) -> int:
    """An n >= low with measure(n) <= room < measure(n + 1), where size = measure(low) <= room.

    A binary search, but for where it looks first: as tokens grow almost evenly with n, a straight line between the
    ends of the interval finds the place in a handful of measurements, each of which reads a whole prompt.
    """
    high, high_size = low, size
    while high_size <= room:
        if high > low:
            guess = low + int((room - size) * (high - low) / max(high_size - size, 1)) + 1
            low, size = high, high_size
            high = min(max(guess, low + 1), 16 * (low + 1))
        else:
            high = low + 16
        high_size = measure(high)
    halve = False
    while high - low > 1:
        before = high - low
        share = 0.5 if halve else (room - size) / (high_size - size)
        middle = min(max(low + int(before * share), low + 1), high - 1)
        middle_size = measure(middle)
        if middle_size <= room:
            low, size = middle, middle_size
        else:
            high, high_size = middle, middle_size
        halve = not halve and high - low > before / 2
    return low
