"""Mixtures: every stretch of rows has its shares, a source gives its rows in turn, any step is found at once."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import DataError, Mixture, Stage, shares_of
from titans_data.mixture import first_rows

SHARES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def in_order(shares: tuple[int, ...], rows: int) -> list[int]:
    """The sources of the first rows of a stage, by sorting the time of every row there could be."""
    times = [(Fraction(2 * k + 1, 2 * w), i) for i, w in enumerate(shares) if w for k in range(rows)]
    return [source for _, source in sorted(times)[:rows]]


@given(shares=SHARES, rows=st.integers(0, 60))
def test_first_rows_counts_the_rows_in_the_order_of_their_times(shares: list[int], rows: int) -> None:
    drawn = in_order(tuple(shares), rows)
    assert first_rows(shares, rows) == [drawn.count(source) for source in range(len(shares))]


@settings(max_examples=60, deadline=None)
@given(shares=SHARES, global_batch=st.integers(1, 12), step=st.integers(0, 20))
def test_a_step_is_its_slice_of_the_endless_order(shares: list[int], global_batch: int, step: int) -> None:
    mixture = Mixture([str(i) for i in range(len(shares))], [Stage(0, tuple(shares))], global_batch)
    order = in_order(tuple(shares), (step + 1) * global_batch)
    sources, positions = mixture.draw(step)
    assert sources.tolist() == order[step * global_batch :]
    assert positions.tolist() == [
        order[:place].count(order[place]) for place in range(step * global_batch, len(order))
    ], "a source gives its rows one after the other"


@settings(max_examples=60, deadline=None)
@given(shares=SHARES, start=st.integers(0, 500), length=st.integers(1, 200))
def test_every_stretch_has_its_shares_but_for_one_row_per_source(shares: list[int], start: int, length: int) -> None:
    before, after = first_rows(shares, start), first_rows(shares, start + length)
    for share, first, last in zip(shares, before, after, strict=True):
        assert abs((last - first) - length * share / sum(shares)) < len(shares)


def stages(number: int) -> st.SearchStrategy[list[Stage]]:
    one = st.tuples(st.integers(1, 7), st.lists(st.integers(0, 5), min_size=number, max_size=number).filter(any))
    return st.lists(one, min_size=1, max_size=4).map(
        lambda parts: [
            Stage(sum(steps for steps, _ in parts[:i]), tuple(shares)) for i, (_, shares) in enumerate(parts)
        ]
    )


@settings(max_examples=80, deadline=None)
@given(stages=stages(3), global_batch=st.integers(1, 8))
def test_a_source_goes_on_where_the_stage_before_has_left_it(stages: list[Stage], global_batch: int) -> None:
    mixture = Mixture(["a", "b", "c"], stages, global_batch)
    counts = [0, 0, 0]
    for step in range(stages[-1].step + 5):
        assert mixture.drawn(step) == counts
        sources, positions = mixture.draw(step)
        assert len(sources) == global_batch
        for source, position in zip(sources.tolist(), positions.tolist(), strict=True):
            assert position == counts[source]
            counts[source] += 1
        stage = [stage for stage in stages if stage.step <= step][-1]
        assert all(stage.shares[source] for source in sources), "a share of 0 gives nothing"


def test_budgets_are_used_up_exactly() -> None:
    """Shares that are whole budgets: 1,000,003 rows and 77 rows, over as many steps as they last."""
    mixture = Mixture(["large", "small"], [Stage(0, (1_000_003, 77))], 40)
    assert mixture.drawn(1_000_080 // 40) == [1_000_003, 77]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([1, 1], (1, 1)),
        ([300, 0, 100], (3, 0, 1)),
        ([1 / 3, 2 / 3], None),
        ([5e-7, 1], (1, 2_000_000)),
    ],
)
def test_weights_become_the_smallest_whole_shares(weights: list[float], shares: tuple[int, ...] | None) -> None:
    found = shares_of(weights)
    if shares is not None:
        assert found == shares
    assert [share / sum(found) for share in found] == pytest.approx([weight / sum(weights) for weight in weights])


def test_a_far_step_of_a_large_mixture_is_found_at_once() -> None:
    mixture = Mixture(list("abcdefgh"), [Stage(0, (7**20, 5**25, 3**40, 1, 11**15, 2, 9, 10**18))], 4096)
    begin = time.process_time()
    sources, _ = mixture.draw(10**9)
    assert time.process_time() - begin < 2.0
    assert len(sources) == 4096


def test_the_order_is_pinned() -> None:
    """A resumed run continues the order of the run that was saved: changing this breaks every checkpoint."""
    mixture = Mixture(["a", "b", "c"], [Stage(0, (5, 3, 1)), Stage(4, (0, 1, 1))], 6)
    assert [part.tolist() for part in mixture.draw(3)] == [[0, 1, 0, 0, 1, 2], [10, 6, 11, 12, 7, 2]]
    assert [part.tolist() for part in mixture.draw(4)] == [[1, 2, 1, 2, 1, 2], [8, 3, 9, 4, 10, 5]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a"], [Stage(0, (1,))], 0), "global_batch is 0"),
        (([], [Stage(0, ())], 1), "give at least one, each with its own name"),
        ((["a", "a"], [Stage(0, (1, 1))], 1), "each with its own name"),
        ((["a"], [], 1), "no stage that begins at step 0"),
        ((["a"], [Stage(1, (1,))], 1), "no stage that begins at step 0"),
        ((["a"], [Stage(0, (1,)), Stage(5, (2,)), Stage(5, (1,))], 1), "begins at step 5 after one that begins at s"),
        ((["a", "b"], [Stage(0, (1,))], 1), r"shares \(1,\) for 2 sources"),
        ((["a", "b"], [Stage(0, (0, 0))], 1), "one of them more than 0"),
        ((["a", "b"], [Stage(0, (2, -1))], 1), "a share of 0 or more"),
    ],
)
def test_impossible_mixtures_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Mixture(*arguments)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="give numbers of 0 or more, one of them above"):
        shares_of(weights)
