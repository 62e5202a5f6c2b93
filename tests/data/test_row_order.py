"""The order of one dataset: every row once per epoch, and few shards open at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import BatchSchedule, DataError, MdsSource, Mixture, RowOrder, Stage, TokenDataset
from titans_data.schedule import permute, source_seed

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


def borders(sizes: list[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(sizes)])


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 6), seed=st.integers(0, 1 << 60))
def test_every_row_comes_once_per_epoch_whatever_the_shards(sizes: list[int], window: int, seed: int) -> None:
    order, total = RowOrder(sum(sizes), seed, borders(sizes), window), sum(sizes)
    for epoch in range(3):
        rows = order.rows(np.arange(epoch * total, (epoch + 1) * total))
        assert sorted(rows.tolist()) == list(range(total))


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 6), seed=st.integers(0, 1 << 60), data=st.data())
def test_any_positions_in_any_order_give_the_same_rows(
    sizes: list[int], window: int, seed: int, data: st.DataObject
) -> None:
    total = sum(sizes)
    whole = RowOrder(total, seed, borders(sizes), window).rows(np.arange(3 * total))
    picked = np.array(data.draw(st.lists(st.integers(0, 3 * total - 1), min_size=1, max_size=30)))
    assert RowOrder(total, seed, borders(sizes), window).rows(picked).tolist() == whole[picked].tolist()


@settings(max_examples=50, deadline=None)
@given(shards=st.integers(1, 30), window=st.integers(1, 6), seed=st.integers(0, 1 << 60))
def test_a_reader_works_in_a_window_of_shards_until_they_are_read(shards: int, window: int, seed: int) -> None:
    size = 20
    order = RowOrder(shards * size, seed, borders([size] * shards), window)
    rows = order.rows(np.arange(shards * size))
    for begin in range(0, shards * size, window * size):
        held = rows[begin : begin + window * size] // size
        assert len(set(held.tolist())) == min(window, shards - begin // size)


def test_rows_of_a_window_are_mixed_and_epochs_take_other_shards_together() -> None:
    order = RowOrder(2000, 3, borders([100] * 20), window=4)
    first, second = order.rows(np.arange(2000)), order.rows(np.arange(2000, 4000))
    assert len(set((first[:40] // 100).tolist())) == 4, "all four shards within the first rows"
    groups = [{frozenset((rows[i : i + 400] // 100).tolist()) for i in range(0, 2000, 400)} for rows in (first, second)]
    assert groups[0] != groups[1]


def test_a_dataset_of_few_shards_is_shuffled_as_a_whole() -> None:
    order = RowOrder(60, 5, borders([20, 20, 20]), window=3)
    assert order.rows(np.arange(60)).tolist() == permute(np.arange(60), 60, 5, 0).tolist()


def test_the_order_is_pinned() -> None:
    """A resumed run continues the order of the run that was saved: changing this breaks every checkpoint."""
    order = RowOrder(12, 0, borders([3, 2, 4, 3]), window=2)
    assert order.rows(np.arange(12)).tolist() == [3, 7, 6, 5, 4, 8, 11, 0, 1, 2, 10, 9]


def test_a_far_position_of_many_shards_is_found_without_a_list_of_rows() -> None:
    shards = 160_000  # ten trillion tokens in shards of 64 MB
    order = RowOrder(shards * 16_000, 1, np.arange(shards + 1) * 16_000)
    rows = order.rows(np.arange(10**9, 10**9 + 1024))
    assert len(set((rows // 16_000).tolist())) <= 32
    assert len(set(rows.tolist())) == 1024


def test_rows_belong_to_the_shard_of_their_first_token(prepared) -> None:
    source = MdsSource(prepared.folder)
    dataset = TokenDataset(source, 64)
    assert len(source.shards) > 3
    for begin, end, first, last in zip(
        source.shards[:-1], source.shards[1:], dataset.shards[:-1], dataset.shards[1:], strict=True
    ):
        for row in range(first, last):
            assert begin <= row * 64 < end
    assert (dataset.shards[0], dataset.shards[-1]) == (0, len(dataset))


def test_the_rows_of_several_sources_follow_each_other() -> None:
    mixture = Mixture(["a", "b"], [Stage(0, (3, 1))], 8)
    orders = [RowOrder(30, 1), RowOrder(11, 2)]
    schedule = BatchSchedule(mixture, orders)
    assert schedule.num_rows == 41
    rows = np.concatenate([schedule.rows(step) for step in range(8)])
    assert rows[rows < 30].tolist() == orders[0].rows(np.arange(48)).tolist()
    assert (rows[rows >= 30] - 30).tolist() == orders[1].rows(np.arange(16)).tolist()
    assert schedule.drawn(8) == [48, 16]
    assert schedule.unread(8) == [0, 0]
    assert schedule.unread(2) == [18, 7]


def test_every_dataset_and_seed_has_its_own_order() -> None:
    assert len({source_seed(seed, name) for seed in range(10) for name in ("a", "b", "c")}) == 30
    assert source_seed(1, "1 2") != source_seed(11, " 2")


@pytest.mark.parametrize(
    ("arguments", "words"), [((0, 1), "num_rows is 0"), ((1, -1), "seed is -1"), ((1, 1, None, 0), "window is 0 sh")]
)
def test_impossible_orders_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(DataError, match=words):
        RowOrder(*arguments)
    with pytest.raises(DataError, match="2 sources and 1 are there"):
        BatchSchedule(Mixture(["a", "b"], [Stage(0, (1, 1))], 1), [RowOrder(5, 0)])
