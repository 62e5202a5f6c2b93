"""What a token stream is made of, counted in all of it or in evenly spread stretches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from titans_data.errors import DataError
from titans_data.sources import TokenSource

STRETCH = 1 << 16


@dataclass(frozen=True)
class Census:
    """Counts over the tokens that were read."""

    num_tokens: int
    """Of the whole stream."""
    read: int
    """Tokens counted."""
    counts: np.ndarray
    """int64 (vocab_size,): how often each id was met."""
    lengths: np.ndarray
    """int64 (n,), sorted: tokens, with the one that ends it, of each document that begins among the tokens counted."""
    unended: int
    """How many of these documents are longer than could be told."""

    @property
    def entropy(self) -> float:
        """Of the ids, each for itself, in bits per token."""
        shares = self.counts[self.counts > 0] / self.read
        return float(-(shares * np.log2(shares)).sum()) + 0.0

    def most_frequent(self, number: int) -> list[tuple[int, float]]:
        """(id, share of the tokens) of the most frequent ids; of equal ones, the lower first."""
        order = np.argsort(-self.counts, kind="stable")[:number]
        return [(int(i), float(self.counts[i] / self.read)) for i in order if self.counts[i]]

    def longer_than(self, tokens: int) -> float:
        """Share of the documents that have more than so many tokens."""
        return float((self.lengths > tokens).mean()) if len(self.lengths) else 0.0


def take_census(source: TokenSource, max_tokens: int | None = None) -> Census:
    """Count at most `max_tokens` tokens of a stream, None for all.

    A document is counted where it begins and followed to its end, so that long ones are met as often as short ones.
    About as many tokens again are read for that at most; what has not ended by then counts with what was seen of it.
    Raises DataError when a setting cannot be, or the source cannot be read.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens of a census is {max_tokens}: give at least 1, or None for all")
    limit = source.num_tokens if max_tokens is None else min(max_tokens, source.num_tokens)
    counts = np.zeros(source.vocab_size, np.int64)
    lengths = [np.zeros(0, np.int64)]
    spare, unended, open_since = limit, 0, -1
    for start, end in _stretches(source.num_tokens, limit):
        for begin in range(start, end, STRETCH):
            stop = min(begin + STRETCH, end)
            tokens, starts = _read(source, begin, stop)
            counts += np.bincount(tokens, minlength=source.vocab_size)
            borders = starts if open_since < 0 else np.array([open_since, *starts])
            lengths.append(np.diff(borders))
            open_since = int(borders[-1]) if len(borders) else -1
        if open_since >= 0:
            last, has_ended = _end_of_document(source, end, spare)
            spare -= last - end
            lengths.append(np.array([last - open_since]))
            unended += not has_ended
            open_since = -1
    return Census(source.num_tokens, limit, counts, np.sort(np.concatenate(lengths)), unended)


def _stretches(num_tokens: int, limit: int) -> Iterator[tuple[int, int]]:
    """[start, end) of stretches of at most STRETCH tokens, `limit` in all, or everything as one."""
    if limit == num_tokens:
        yield 0, num_tokens
        return
    number = -(-limit // STRETCH)
    for i in range(number):
        length = limit * (i + 1) // number - limit * i // number
        yield (start := (num_tokens - limit) * i // max(number - 1, 1) + limit * i // number), start + length


def _read(source: TokenSource, begin: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens from `begin` to before `stop`, and where in the stream documents begin among them."""
    before = int(begin > 0)
    tokens, documents = source.read(begin - before, stop - begin + before)
    is_start = np.diff(documents, prepend=documents[0] - (not before)).astype(bool)
    return tokens[before:], begin + np.flatnonzero(is_start[before:])


def _end_of_document(source: TokenSource, position: int, spare: int) -> tuple[int, bool]:
    """Where the document that is open at `position` ends, or how far it was followed; and whether it has ended."""
    bound = min(position + spare, source.num_tokens)
    while position < bound:
        stop = min(position + max(STRETCH // 16, 1), bound)
        _, starts = _read(source, position, stop)
        if len(starts):
            return int(starts[0]), True
        position = stop
    return bound, bound == source.num_tokens
