"""The rows of several datasets under one numbering, and what is fetched before it is read."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from titans_data import (
    BatchSchedule,
    DataError,
    MixedDataset,
    Mixture,
    RowOrder,
    SyntheticSource,
    TokenDataset,
    batches,
    stream_evaluation_batches,
)
from titans_data.prefetch import Prefetch


class Recorded(SyntheticSource):
    """A source that says it is remote and remembers what was fetched."""

    is_remote = True

    def __init__(self, num_tokens: int) -> None:
        super().__init__(64, num_tokens, seed=1)
        self.fetched: list[tuple[int, int]] = []

    def fetch(self, start: int, length: int) -> None:
        self.fetched.append((start, length))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_rows_follow_each_other_and_do_not_cross_over() -> None:
    parts = [TokenDataset(SyntheticSource(64, 1000, seed), 16, packed=True) for seed in (1, 2)]
    mixed = MixedDataset(parts)
    assert len(mixed) == len(parts[0]) + len(parts[1])
    first = len(parts[0])
    for row, (part, inside) in {0: (0, 0), first - 1: (0, first - 1), first: (1, 0), first + 5: (1, 5)}.items():
        assert mixed.locate(row) == (part, inside)
        for name, expected in parts[part].row(inside, continues=inside > 0).items():
            assert torch.equal(mixed.row(row, continues=row > 0)[name], expected)
    assert mixed.row(first, continues=True)["starts"][0], "nothing of the first dataset is carried into the second"
    for row in (-1, len(mixed)):
        with pytest.raises(IndexError):
            mixed.row(row)


def test_a_dataset_that_is_gone_keeps_its_numbers_and_cannot_be_read() -> None:
    part = TokenDataset(SyntheticSource(64, 1000, 1), 16)
    mixed = MixedDataset([7, part, 5])
    assert (len(mixed), mixed.num_tokens) == (12 + len(part), 1000)
    assert torch.equal(mixed[7]["tokens"], part[0]["tokens"])
    for row in (0, 6, 7 + len(part), len(mixed) - 1):
        with pytest.raises(IndexError):
            mixed[row]


def test_rows_of_different_forms_are_refused() -> None:
    source = SyntheticSource(64, 1000, 1)
    for other in (TokenDataset(source, 8), TokenDataset(source, 16, packed=True)):
        with pytest.raises(DataError, match="give all the same form"):
            MixedDataset([TokenDataset(source, 16), other])


def test_bytes_per_token_are_weighed_by_tokens() -> None:
    sources = [SyntheticSource(64, tokens, 1) for tokens in (1000, 3000)]
    parts = [TokenDataset(source, 16) for source in sources]
    assert MixedDataset(parts).bytes_per_token is None
    parts[0].bytes_per_token, parts[1].bytes_per_token = 2.0, 4.0
    assert MixedDataset(parts).bytes_per_token == pytest.approx(3.5)


def test_streams_of_an_evaluation_begin_anew_with_each_dataset() -> None:
    mixed = MixedDataset([TokenDataset(SyntheticSource(64, 161, seed), 16, packed=True) for seed in (1, 2)])
    rows = [batch for batch in stream_evaluation_batches(mixed, 0, 1, 1) if batch["valid"].all()]
    assert len(rows) == len(mixed) == 20
    assert [bool(batch["starts"][0, 0]) for batch in rows] == [row in (0, 10) for row in range(20)]


# ---- fetching ahead


def test_what_the_next_steps_read_is_fetched_and_no_more() -> None:
    source = Recorded(16 * 400 + 1)
    data = TokenDataset(source, 16)
    schedule = BatchSchedule(Mixture.of_one(4), [RowOrder(len(data), 3)])
    reader = batches(data, schedule, 5, 1, 2, 2, fetch_ahead=3)
    mine = [schedule.rows(step)[2:].tolist() for step in range(5, 20)]
    for read in range(1, 4):
        next(reader)
        expected = [(row * 16, 17) for rows in mine[: read + 3] for row in rows]
        until(lambda expected=expected: len(source.fetched) >= len(expected))
        time.sleep(0.05)
        assert source.fetched == expected
    reader.close()  # type: ignore[attr-defined]
    until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))


def test_nothing_is_fetched_ahead_of_local_data() -> None:
    data = TokenDataset(SyntheticSource(64, 1000, 1), 16)
    schedule = BatchSchedule(Mixture.of_one(4), [RowOrder(len(data), 3)])
    list(itertools.islice(batches(data, schedule, 0, 0, 1, 2), 2))
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_what_cannot_be_fetched_is_left_to_the_reader() -> None:
    tried: list[int] = []

    def fetch(row: int) -> None:
        tried.append(row)
        if row % 2:
            raise DataError("gone")

    ahead = Prefetch(lambda step: np.array([2 * step, 2 * step + 1]).tolist(), fetch, 0, 2)
    until(lambda: len(tried) == 6)
    assert tried == [0, 1, 2, 3, 4, 5]
    ahead.reading(1)
    until(lambda: len(tried) == 8)
    ahead.stop()
