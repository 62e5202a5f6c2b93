"""The global order: a pure function of (seed, step), the same on any number of ranks, every row once per epoch."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import (
    BatchSchedule,
    DataError,
    MdsSource,
    Mixture,
    RowOrder,
    SyntheticSource,
    TokenDataset,
    TokenFileSource,
    batches,
    evaluation_batches,
)
from titans_data.schedule import permute

WORLDS = [1, 2, 3, 4, 6, 12]


class Counting:
    """A source in which the token at position i is i."""

    vocab_size = 1 << 40
    fingerprint = "counting"
    tokenizer = None
    bytes_per_token = None
    is_remote = False

    def __init__(self, num_tokens: int, shards: list[int] | None = None) -> None:
        self.num_tokens = num_tokens
        self.shards = np.array([0, num_tokens] if shards is None else shards)

    def fetch(self, start: int, length: int) -> None:
        raise AssertionError("nothing is remote")

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        assert 0 <= start < start + length <= self.num_tokens
        return np.arange(start, start + length), np.zeros(length, np.int32)


def one(num_rows: int, global_batch: int, seed: int) -> BatchSchedule:
    """The schedule of a single dataset."""
    return BatchSchedule(Mixture.of_one(global_batch), [RowOrder(num_rows, seed)])


def first_tokens(micro_batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row) for batch in micro_batches for row in batch["tokens"][:, 0]]


# ---- rows


@settings(deadline=None)
@given(length=st.integers(1, 30), extra=st.integers(0, 200))
def test_every_token_but_the_first_is_a_target_once(length: int, extra: int) -> None:
    dataset = TokenDataset(Counting(length + 1 + extra), length)
    targets = [int(token) for row in range(len(dataset)) for token in dataset[row]["tokens"][1:]]
    assert targets == list(range(1, len(targets) + 1))
    assert length + 1 + extra - len(targets) - 1 < length, "less than one row is left out"


def test_rows_are_tokens_and_documents(prepared: Any) -> None:
    dataset = TokenDataset(MdsSource(prepared.folder), 64)
    for row in (0, 1, len(dataset) - 1):
        tokens, documents = prepared.train.span(row * 64, 65)
        item = dataset[row]
        assert item["tokens"].tolist() == tokens
        assert item["documents"].tolist() == documents
        assert (item["tokens"].dtype, item["documents"].dtype) == (torch.int64, torch.int32)


def test_a_row_outside_the_data_is_an_index_error() -> None:
    dataset = TokenDataset(Counting(11), 5)
    assert len(dataset) == 2
    with pytest.raises(IndexError):
        dataset[2]
    with pytest.raises(IndexError):
        dataset[-1]


def test_a_corpus_shorter_than_one_row_says_both_numbers() -> None:
    assert len(TokenDataset(Counting(9), 8)) == 1
    with pytest.raises(DataError, match="has 8 tokens and one row of sequence_length 8 needs 9"):
        TokenDataset(Counting(8), 8)
    with pytest.raises(DataError, match="sequence_length is 0"):
        TokenDataset(Counting(8), 0)


# ---- the schedule


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 1 << 63), epoch=st.integers(0, 1 << 40))
def test_a_permutation_hits_everything_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    global_batch=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_every_row_comes_exactly_once_per_epoch(num_rows: int, global_batch: int, seed: int) -> None:
    schedule = one(num_rows, global_batch, seed)
    steps = -(-3 * num_rows // global_batch)
    stream = np.concatenate([schedule.rows(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows].tolist()) == list(range(num_rows))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_shuffle_is_not_distinguishable_from_random_by_simple_counts() -> None:
    size, orders = 97, np.stack([permute(np.arange(97), 97, 3, epoch) for epoch in range(2000)])
    # Each position sees each row 2000 / 97 times on average; chi-square over the 97 x 97 table.
    table = np.zeros((size, size))
    for order in orders:
        table[np.arange(size), order] += 1
    expected = len(orders) / size
    chi = ((table - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 6 * (2 * freedom) ** 0.5
    # Neighbors in the file are not neighbors in time.
    correlation = np.mean([np.corrcoef(order, np.arange(size))[0, 1] for order in orders])
    assert abs(correlation) < 0.01


def test_the_order_is_pinned() -> None:
    """A resumed run continues the order of the run that was saved: changing this breaks every checkpoint."""
    assert one(10, 10, seed=0).rows(0).tolist() == [4, 2, 1, 7, 5, 6, 3, 8, 9, 0]
    huge = one(10**12, 4, seed=123).rows(10**9).tolist()
    assert huge == [119824659844, 838401861835, 937874223396, 626071603659]


def test_a_step_of_a_huge_corpus_costs_no_more_than_its_batch() -> None:
    schedule = one(10**12, 1024, 0)
    begin = time.process_time()
    rows = schedule.rows(987_654_321)
    assert time.process_time() - begin < 1.0
    assert len(set(rows.tolist())) == 1024
    assert 0 <= rows.min() <= rows.max() < 10**12


@pytest.mark.parametrize(("num_rows", "global_batch", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_schedules_are_refused(num_rows: int, global_batch: int, seed: int) -> None:
    with pytest.raises(DataError):
        one(num_rows, global_batch, seed)


# ---- batches


@pytest.mark.parametrize("world", WORLDS)
def test_the_slices_of_all_ranks_in_rank_order_are_the_global_batch(world: int) -> None:
    dataset = TokenDataset(Counting(401), 4)
    schedule = one(len(dataset), global_batch=24, seed=9)
    ranks = [batches(dataset, schedule, 3, rank, world, micro_batch=2) for rank in range(world)]
    for step in range(3, 12):
        parts = [next(rank) for rank in ranks]
        assert [number for number, _ in parts] == [step] * world
        assert all(len(micro_batches) == 24 // world // 2 for _, micro_batches in parts)
        together = [first // 4 for _, micro_batches in parts for first in first_tokens(micro_batches)]
        assert together == schedule.rows(step).tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_are_stacked_rows(prepared: Any, packed: bool) -> None:
    dataset = TokenDataset(MdsSource(prepared.folder), 32, packed)
    schedule = one(len(dataset), global_batch=6, seed=0)
    step, micro_batches = next(batches(dataset, schedule, 0, 0, 1, micro_batch=3))
    assert step == 0
    rows = schedule.rows(0).reshape(2, 3)
    for batch, expected in zip(micro_batches, rows, strict=True):
        assert set(batch) == ({"tokens", "documents", "starts"} if packed else {"tokens"})
        assert batch["tokens"].shape == (3, 33)
        for number, row in enumerate(expected):
            tokens, documents = prepared.train.span(int(row) * 32, 33)
            assert batch["tokens"][number].tolist() == tokens
            if packed:
                assert batch["documents"][number].tolist() == documents


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_starting_at_another_step(workers: int, prepared: Any) -> None:
    dataset = TokenDataset(MdsSource(prepared.folder), 16, packed=True)
    schedule = one(len(dataset), global_batch=8, seed=4)
    straight = list(itertools.islice(batches(dataset, schedule, 0, 0, 1, 2), 9))
    resumed = list(itertools.islice(batches(dataset, schedule, 5, 0, 1, 2, workers=workers), 4))
    for (step, expected), (resumed_step, got) in zip(straight[5:], resumed, strict=True):
        assert step == resumed_step
        for left, right in zip(expected, got, strict=True):
            assert torch.equal(left["tokens"], right["tokens"])
            assert torch.equal(left["documents"], right["documents"])


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(workers: int) -> None:
    dataset = TokenDataset(SyntheticSource(64, 1000, 0), 16)
    before = torch.get_rng_state()
    next(batches(dataset, one(len(dataset), 4, 0), 0, 0, 1, 4, workers=workers))
    list(evaluation_batches(dataset, 0, 1, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_token_is_one_sentence_with_and_without_workers(workers: int, tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    dataset = TokenDataset(TokenFileSource(tmp_path / "a.bin", "uint16", 50), 9)
    endless = batches(dataset, one(len(dataset), len(dataset), 0), 0, 0, 1, 1, workers=workers)
    with pytest.raises(DataError, match=r"holds token \d+, its vocabulary ends at 49") as refusal:
        next(endless)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 2}, "rank is 2 of 2"),
        ({"rank": -1}, "rank is -1 of 2"),
        ({"micro_batch": 3}, "global_batch 8 is not a multiple of 2 data-parallel ranks \\* micro_batch 3"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"start_step": -1}, "start_step is -1"),
        ({"schedule": one(7, 8, 0)}, "schedule is for 7 rows and the data has 12"),
    ],
)
def test_what_does_not_divide_is_refused_before_the_first_batch(changes: dict[str, Any], words: str) -> None:
    dataset = TokenDataset(Counting(49), 4)
    arguments = {"schedule": one(12, 8, 0), "start_step": 0, "rank": 0, "world": 2, "micro_batch": 2}
    with pytest.raises(DataError, match=words):
        batches(dataset, **(arguments | changes))


# ---- evaluation


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(1, 50),
    world=st.integers(1, 7),
    micro_batch=st.integers(1, 5),
    limit=st.none() | st.integers(1, 60),
)
def test_evaluation_reads_every_row_once_in_equally_many_batches(
    num_rows: int, world: int, micro_batch: int, limit: int | None
) -> None:
    dataset = TokenDataset(Counting(num_rows * 3 + 1), 3)
    ranks = [list(evaluation_batches(dataset, rank, world, micro_batch, limit)) for rank in range(world)]
    count = num_rows if limit is None else min(limit, num_rows)
    assert {len(rank) for rank in ranks} == {-(-count // (world * micro_batch))}
    seen = []
    for turn in zip(*ranks, strict=True):
        for batch in turn:
            assert batch["tokens"].shape == (micro_batch, 4)
            assert batch["valid"].shape == (micro_batch,)
            assert batch["valid"].dtype == torch.bool
            seen += (batch["tokens"][batch["valid"]][:, 0] // 3).tolist()
    assert len(seen) == count
    assert seen == sorted(set(seen))
    if limit is None:
        assert seen == list(range(num_rows))


def test_a_limited_evaluation_is_spread_over_the_data() -> None:
    dataset = TokenDataset(Counting(1001), 10)
    rows = [int(batch["tokens"][0, 0]) // 10 for batch in evaluation_batches(dataset, 0, 1, 1, limit_rows=4)]
    assert rows == [0, 25, 50, 75]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((1, 1, 1), "rank is 1 of 1"), ((0, 1, 0), "micro_batch is 0"), ((0, 1, 1, 0), "limit_rows is 0")],
)
def test_impossible_evaluations_are_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluation_batches(TokenDataset(Counting(11), 5), *arguments)
