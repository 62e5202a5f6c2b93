"""Rows in the order of the stream: lanes that never skip a row, and where a model must forget, token by token."""

from __future__ import annotations

import itertools
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
    Stage,
    StreamSchedule,
    TokenDataset,
    batches,
    evaluation_batches,
    stream_evaluation_batches,
)
from titans_data.sources import document_ids

LENGTH = 4
NUMBERS = st.integers(1, 60)


class Documents:
    """A source in which the token at position i is i, and documents begin at chosen positions."""

    vocab_size = 1 << 40
    fingerprint = "documents"
    tokenizer = None
    bytes_per_token = None
    is_remote = False

    def __init__(self, num_tokens: int, begins: set[int]) -> None:
        self.num_tokens = num_tokens
        self.shards = np.array([0, num_tokens])
        self.begins = begins | {0}

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        assert 0 <= start < start + length <= self.num_tokens
        positions = np.arange(start, start + length)
        return positions, document_ids(np.isin(positions, list(self.begins)))


def one(num_rows: int, lanes: int, seed: int) -> StreamSchedule:
    """The schedule of a single dataset."""
    return StreamSchedule(Mixture.of_one(lanes), [num_rows], [seed])


def dataset(rows: int, begins: set[int]) -> TokenDataset:
    return TokenDataset(Documents(rows * LENGTH + 1, begins), LENGTH, packed=True)


# ---- starts


@settings(deadline=None)
@given(begins=st.sets(st.integers(0, 20)))
def test_a_packed_row_says_where_its_documents_start(begins: set[int]) -> None:
    data = dataset(5, begins)
    for row in range(5):
        positions = range(row * LENGTH, (row + 1) * LENGTH)
        whole = [position in begins | {0} for position in positions]
        assert data[row]["starts"].tolist() == [True, *whole[1:]]
        if row > 0:
            item = data.row(row, continues=True)
            assert item["starts"].tolist() == whole
            assert {name: value.tolist() for name, value in item.items() if name != "starts"} == {
                name: value.tolist() for name, value in data[row].items() if name != "starts"
            }


def test_the_end_of_a_document_is_its_own_and_the_next_token_starts_another(prepared: Any) -> None:
    data = TokenDataset(MdsSource(prepared.folder), 64, packed=True)
    tokens = prepared.train.tokens
    for row in range(1, len(data)):
        ends = [tokens[position - 1] == 256 for position in range(row * 64, row * 64 + 64)]
        assert data.row(row, continues=True)["starts"].tolist() == ends


def test_joined_rows_have_no_starts() -> None:
    data = TokenDataset(Documents(41, {7}), LENGTH)
    assert set(data[1]) == {"tokens", "documents"}


def test_shuffled_rows_all_start_anew() -> None:
    data = dataset(12, {5, 11})
    _, micro_batches = next(batches(data, BatchSchedule(Mixture.of_one(6), [RowOrder(12, 0)]), 3, 0, 1, 3))
    for batch in micro_batches:
        assert batch["starts"].shape == (3, LENGTH)
        assert batch["starts"][:, 0].all()


# ---- the schedule


@settings(max_examples=60, deadline=None)
@given(num_rows=NUMBERS, lanes=st.integers(1, 20), seed=st.integers(0, 1000))
def test_a_lane_reads_one_row_after_the_other_round_the_whole_stream(num_rows: int, lanes: int, seed: int) -> None:
    schedule = one(num_rows, lanes, seed)
    steps = np.stack([schedule.rows(step) for step in range(2 * num_rows)])
    assert (steps[1:] == (steps[:-1] + 1) % num_rows).all()
    continues = np.stack([schedule.continues(step) for step in range(2 * num_rows)])
    assert not continues[0].any()
    assert (continues[1:] == (steps[1:] == steps[:-1] + 1)).all()


@settings(max_examples=60, deadline=None)
@given(lanes=st.integers(1, 12), share=st.integers(1, 9), extra=st.integers(0, 11), seed=st.integers(0, 1000))
def test_an_epoch_reads_every_row_once(lanes: int, share: int, extra: int, seed: int) -> None:
    num_rows = lanes * share + extra % lanes
    schedule = one(num_rows, lanes, seed)
    epoch = np.concatenate([schedule.rows(step) for step in range(share)])
    assert len(set(epoch.tolist())) == lanes * share
    with_rest = np.concatenate([epoch, schedule.rows(share)])
    assert set(with_rest.tolist()) == set(range(num_rows))


def test_the_seed_chooses_where_the_lanes_begin() -> None:
    assert len({tuple(one(1000, 4, seed).rows(0)) for seed in range(20)}) > 15


STAGES = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.sampled_from([0, 2, 3, 4]), min_size=2, max_size=2).filter(any)),
    min_size=1,
    max_size=4,
)


def mixed(parts: list[tuple[int, list[int]]], sizes: list[int], lanes: int = 4) -> StreamSchedule:
    """Two sources; `parts` are the stages, each with its number of steps."""
    stages = [Stage(sum(steps for steps, _ in parts[:i]), tuple(shares)) for i, (_, shares) in enumerate(parts)]
    return StreamSchedule(Mixture(["a", "b"], stages, lanes), sizes, [5, 6])


@settings(max_examples=80, deadline=None)
@given(parts=STAGES, sizes=st.lists(st.integers(1, 60), min_size=2, max_size=2))
def test_lanes_read_on_whatever_the_stages_unless_they_change_the_source(
    parts: list[tuple[int, list[int]]], sizes: list[int]
) -> None:
    schedule, steps = mixed(parts, sizes), sum(length for length, _ in parts)
    rows = np.stack([schedule.rows(step) for step in range(steps)])
    continues = np.stack([schedule.continues(step) for step in range(steps)])
    sources = (rows >= sizes[0]).astype(int)
    assert not continues[0].any()
    for step in range(1, steps):
        for lane in range(4):
            size, first = (sizes[0], 0) if sources[step, lane] == 0 else (sizes[1], sizes[0])
            before, now = rows[step - 1, lane], rows[step, lane]
            if sources[step - 1, lane] == sources[step, lane]:
                assert now - first == (before - first + 1) % size, "a lane that stays reads the next row"
            assert continues[step, lane] == (
                sources[step - 1, lane] == sources[step, lane] and now == before + 1 and now > first
            )
    for step in range(steps + 1):
        read = [rows[:step][sources[:step] == source] for source in (0, 1)]
        assert schedule.drawn(step) == [len(each) for each in read]
        assert schedule.unread(step) == [size - len(set(each)) for size, each in zip(sizes, read, strict=True)]


@settings(max_examples=60, deadline=None)
@given(parts=STAGES)
def test_a_stage_moves_no_more_lanes_than_it_must(parts: list[tuple[int, list[int]]]) -> None:
    schedule = mixed(parts, [1000, 1000])
    borders = [stage.step for stage in schedule.mixture.stages][1:]
    for step in borders:
        before, now = (schedule.rows(s) >= 1000 for s in (step - 1, step))
        assert (before != now).sum() == abs(int(before.sum()) - int(now.sum()))


def test_a_lane_that_comes_to_a_source_begins_where_most_is_unread() -> None:
    schedule = mixed([(10, [1, 1]), (10, [3, 1])], [1000, 1000])
    before = sorted(schedule.rows(9)[schedule.rows(9) < 1000].tolist())
    now = sorted(schedule.rows(10)[schedule.rows(10) < 1000].tolist())
    new = (set(now) - {row + 1 for row in before}).pop()
    assert sorted({row + 1 for row in before} | {new}) == now
    distances = [(new - row - 1) % 1000 for row in before]
    assert min(distances) == pytest.approx(245, abs=2), "half way to where the other lane began"


def test_streams_of_two_sources_read_no_row_twice_while_any_is_unread() -> None:
    """Lanes come and go, and in the end the rows that were read twice are those of lanes that met."""
    schedule = mixed([(50, [1, 1]), (50, [3, 1]), (50, [1, 3])], [1000, 1000])
    assert schedule.drawn(150) == [2 * 50 + 3 * 50 + 50, 2 * 50 + 50 + 3 * 50]
    assert schedule.unread(150) == [1000 - 300, 1000 - 300]


def test_a_source_that_gets_no_lane_is_refused() -> None:
    with pytest.raises(DataError, match=r"b has a share of 1 in 101, which is none of 4 streams: give it a larger"):
        mixed([(1, [100, 1])], [10, 10])


def test_the_order_is_pinned() -> None:
    """A resumed run continues the lanes of the run that was saved: changing this breaks every checkpoint."""
    assert one(10, 3, 0).rows(0).tolist() == [4, 7, 0]
    assert one(10**12, 3, 7).rows(10**9).tolist() == [690534668941, 23868002274, 357201335607]


@pytest.mark.parametrize(("num_rows", "lanes", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_schedules_are_refused(num_rows: int, lanes: int, seed: int) -> None:
    with pytest.raises(DataError):
        one(num_rows, lanes, seed)


# ---- batches


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 1), (3, 0), (6, 0)])
def test_every_number_of_ranks_sees_the_same_lanes_and_the_same_starts(world: int, workers: int) -> None:
    num_rows, lanes, first = 20, 12, 17
    begins = {2, 8, 9, 27, 40, 63, 64}
    data, schedule = dataset(num_rows, begins), one(num_rows, lanes, 3)
    ranks = [batches(data, schedule, first, rank, world, micro_batch=2, workers=workers) for rank in range(world)]
    for step in range(first, first + 8):
        parts = [batch for rank in ranks for batch in next(rank)[1]]
        tokens, starts = (torch.cat([batch[name] for batch in parts]) for name in ("tokens", "starts"))
        assert (tokens[:, 0] // LENGTH).tolist() == schedule.rows(step).tolist()
        # A model must forget before a document, and where the stream has come round: nothing else.
        assert starts.tolist() == [[int(token) in begins | {0} for token in row[:-1]] for row in tokens]


def test_the_first_step_of_a_run_starts_every_lane() -> None:
    data, schedule = dataset(20, set()), one(20, 4, 3)
    steps = [batch["starts"] for _, (batch,) in itertools.islice(batches(data, schedule, 0, 0, 1, 4), 2)]
    assert steps[0][:, 0].all() and not steps[0][:, 1:].any()
    assert not steps[1].any()


# ---- evaluation


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(1, 25),
    begins=st.sets(st.integers(0, 100), max_size=8),
    world=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    limit=st.none() | st.integers(1, 30),
)
def test_evaluation_sees_every_row_once_after_all_of_its_document(
    num_rows: int, begins: set[int], world: int, micro_batch: int, limit: int | None
) -> None:
    data = dataset(num_rows, begins)
    ranks = [list(stream_evaluation_batches(data, rank, world, micro_batch, limit)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    counted = []
    for rank in ranks:
        for lane in range(micro_batch):
            memory: list[int] = []  # what a model has seen since it last forgot
            for batch in rank:
                tokens, starts = batch["tokens"][lane, :-1].tolist(), batch["starts"][lane].tolist()
                for token, start in zip(tokens, starts, strict=True):
                    memory = [token] if start else [*memory, token]
                    if batch["valid"][lane]:
                        begin = max(position for position in begins | {0} if position <= token)
                        assert memory == list(range(begin, token + 1))
                if batch["valid"][lane]:
                    counted.append(tokens[0] // LENGTH)
    assert sorted(counted) == list(range(num_rows if limit is None else min(limit, num_rows)))


def test_lanes_of_short_documents_read_little_twice() -> None:
    data = dataset(120, set(range(3, 480, 5)))
    steps = list(stream_evaluation_batches(data, 0, 1, 12))
    assert len(steps) == 11  # a share of ten rows, and one row before it for the document that reaches into it


def test_packed_rows_for_themselves_are_evaluated_from_fresh() -> None:
    data = dataset(6, {5, 9})
    for batch in evaluation_batches(data, 0, 1, 2):
        assert batch["starts"][:, 0].all()
        assert batch["starts"][:, 1:].tolist() == [
            [int(token) in {5, 9} for token in row[1:-1]] for row in batch["tokens"]
        ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((1, 1, 1), "rank is 1 of 1"), ((0, 1, 0), "micro_batch is 0"), ((0, 1, 1, 0), "limit_rows is 0")],
)
def test_impossible_evaluations_are_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        stream_evaluation_batches(dataset(3, set()), *arguments)
