"""A census is what a plain loop over the tokens counts."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from titans_data import DataError, MdsSource, SyntheticSource, census
from titans_data.census import Census, take_census


class ListedSource:
    """Documents given as lists of tokens, which counts what is read of it."""

    bytes_per_token = None
    tokenizer = None
    is_remote = False
    fingerprint = "listed"

    def __init__(self, documents: list[list[int]], vocab_size: int) -> None:
        self.tokens = np.array([token for document in documents for token in document], np.int64)
        self.starts = np.array([not i for document in documents for i in range(len(document))])
        self.num_tokens, self.vocab_size = len(self.tokens), vocab_size
        self.shards = np.array([0, self.num_tokens])
        self.was_read = 0

    def fetch(self, start: int, length: int) -> None: ...

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        assert start >= 0 and length > 0 and start + length <= self.num_tokens
        self.was_read += length
        ids = np.cumsum(self.starts[start : start + length], dtype=np.int32)
        return self.tokens[start : start + length], ids - ids[0]


def plain(documents: list[list[int]], stretches: list[tuple[int, int]]) -> tuple[Counter[int], list[int]]:
    """Counts of tokens, and lengths of the documents that begin, in stretches [start, end)."""
    stream = [token for document in documents for token in document]
    counts = Counter(token for start, end in stretches for token in stream[start:end])
    begins = np.cumsum([0, *map(len, documents)])
    lengths = [
        len(document)
        for begin, document in zip(begins, documents, strict=False)
        if any(start <= begin < end for start, end in stretches)
    ]
    return counts, sorted(lengths)


@pytest.mark.parametrize("max_tokens", [None, 1, 7, 100, 333, 1000, 10**6])
def test_counts_and_lengths_are_those_of_a_plain_loop(max_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "STRETCH", 50)
    draw = np.random.default_rng(3)
    documents = [draw.integers(0, 40, draw.choice([1, 2, 10, 90])).tolist() for _ in range(60)]
    source = ListedSource(documents, 50)
    found = take_census(source, max_tokens)
    limit = min(max_tokens or source.num_tokens, source.num_tokens)
    stretches = list(census._stretches(source.num_tokens, limit))
    assert sum(end - start for start, end in stretches) == limit == found.read
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(stretches))
    assert stretches[0][0] == 0
    assert len(stretches) == 1 or stretches[-1][1] == source.num_tokens
    counts, lengths = plain(documents, stretches)
    assert dict(enumerate(found.counts.tolist())) == {token: counts[token] for token in range(50)}
    if not found.unended:
        assert found.lengths.tolist() == lengths
    # Documents are followed as far again, in pieces of 3 tokens and the one before each.
    assert source.was_read <= limit + 2 * len(stretches) + (limit + 3 * len(stretches)) * 4 / 3


def test_a_document_without_end_is_followed_as_far_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "STRETCH", 10)
    source = ListedSource([[1] * 10_000], 4)
    found = take_census(source, 100)
    assert (found.lengths.tolist(), found.unended) == ([110], 1)
    assert take_census(source).lengths.tolist() == [10_000]


def test_documents_across_stretches_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "STRETCH", 10)
    documents = [[1] * 25, [2] * 5, [3] * 40, [1] * 30]
    found = take_census(ListedSource(documents, 4))
    assert found.lengths.tolist() == [5, 25, 30, 40]


def test_what_is_derived_from_the_counts() -> None:
    found = Census(8, 8, np.array([4, 0, 2, 2]), np.array([1, 3, 4]), 0)
    assert found.entropy == 1.5
    assert found.most_frequent(3) == [(0, 0.5), (2, 0.25), (3, 0.25)]
    assert found.most_frequent(9) == found.most_frequent(3)
    assert found.longer_than(3) == pytest.approx(1 / 3)
    assert Census(5, 5, np.array([5]), np.zeros(0, np.int64), 0).entropy == 0
    assert Census(5, 5, np.array([5]), np.zeros(0, np.int64), 0).longer_than(1) == 0


def test_a_prepared_dataset_is_counted_as_its_card_says(prepared) -> None:  # type: ignore[no-untyped-def]
    found = take_census(MdsSource(prepared.folder, "train"))
    split = prepared.card.splits["train"]
    assert (found.read, len(found.lengths)) == (split.tokens, split.documents)
    assert found.counts.tolist() == [Counter(prepared.train.tokens)[token] for token in range(257)]


def test_synthetic_documents_are_of_512_tokens() -> None:
    found = take_census(SyntheticSource(64, 1 << 18), 100_000)
    assert set(found.lengths.tolist()) == {512}
    assert found.entropy == pytest.approx(math.log2(64), abs=0.01)


def test_nothing_cannot_be_counted() -> None:
    with pytest.raises(DataError, match="max_tokens of a census is 0: give at least 1"):
        take_census(SyntheticSource(64, 1000), 0)
