"""Resume on any number of ranks and loader processes: the same global batches, nothing repeated, nothing skipped."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from titans_data import (
    BatchSchedule,
    MdsSource,
    MixedDataset,
    Mixture,
    RowOrder,
    Rows,
    Schedule,
    Stage,
    StreamSchedule,
    SyntheticSource,
    TokenDataset,
    batches,
    source_seed,
)

LENGTH, GLOBAL_BATCH, STEPS = 32, 8, 12
LAYOUTS = list(itertools.product((1, 2, 4), (0, 2)))


@pytest.fixture(scope="module")
def rows(prepared: Any) -> MixedDataset:
    """A prepared dataset of many shards, and synthetic tokens."""
    sources = [MdsSource(prepared.folder), SyntheticSource(257, 3000, 1)]
    return MixedDataset([TokenDataset(source, LENGTH, packed=True) for source in sources])


@pytest.fixture(scope="module", params=["shuffled", "streams"])
def schedule(request: pytest.FixtureRequest, rows: MixedDataset) -> Schedule:
    """Two sources, whose mixture changes at step 5."""
    mixture = Mixture(["text", "made up"], [Stage(0, (3, 1)), Stage(5, (1, 1))], GLOBAL_BATCH)
    sizes = [len(dataset) for dataset in rows._datasets]
    seeds = [source_seed(7, dataset.source.fingerprint) for dataset in rows._datasets]
    if request.param == "streams":
        return StreamSchedule(mixture, sizes, seeds)
    shards = [dataset.shards for dataset in rows._datasets]
    return BatchSchedule(mixture, [RowOrder(*each, window=4) for each in zip(sizes, seeds, shards, strict=True)])


@pytest.fixture(scope="module")
def straight(rows: Rows, schedule: Schedule) -> list[dict[str, torch.Tensor]]:
    """The global batches of a run that was never stopped, put together row by row."""
    return [rows.stack(schedule.rows(step).tolist(), schedule.continues(step).tolist()) for step in range(STEPS)]


def global_batches(
    rows: Rows, schedule: Schedule, start: int, ranks: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """What all ranks together read from a step on, each rank with loader processes of its own."""
    readers = [batches(rows, schedule, start, rank, ranks, micro_batch=2, workers=workers) for rank in range(ranks)]
    for step in itertools.count(start):
        parts = [next(reader) for reader in readers]
        assert [number for number, _ in parts] == [step] * ranks
        micro_batches = [batch for _, mine in parts for batch in mine]
        yield {name: torch.cat([batch[name] for batch in micro_batches]) for name in micro_batches[0]}


@pytest.mark.parametrize("before", LAYOUTS, ids=str)
def test_a_resume_on_any_layout_goes_on_with_the_same_global_batches(
    rows: Rows, schedule: Schedule, straight: list[dict[str, torch.Tensor]], before: tuple[int, int]
) -> None:
    """(ranks, loader processes) before the stop; after it every pair; the step of the stop is drawn anew each time."""
    choose = random.Random(str(before))
    for after in LAYOUTS:
        stop = choose.randrange(1, STEPS - 1)
        first = itertools.islice(global_batches(rows, schedule, 0, *before), stop)
        second = itertools.islice(global_batches(rows, schedule, stop, *after), min(3, STEPS - stop))
        for expected, found in zip(straight, itertools.chain(first, second), strict=False):
            assert expected.keys() == found.keys()
            for name in expected:
                assert torch.equal(expected[name], found[name]), (before, after, stop, name)


def test_the_run_that_was_never_stopped_repeats_and_skips_nothing(schedule: Schedule) -> None:
    order = np.concatenate([schedule.rows(step) for step in range(STEPS)])
    assert len(order) == STEPS * GLOBAL_BATCH
    for drawn, unread, (first, last) in zip(
        schedule.drawn(STEPS), schedule.unread(STEPS), _borders(schedule), strict=True
    ):
        mine = order[(first <= order) & (order < last)]
        assert len(mine) == drawn
        assert len(set(mine.tolist())) == min(drawn, last - first) == last - first - unread


def _borders(schedule: Schedule) -> list[tuple[int, int]]:
    offsets = schedule._offsets.tolist()  # type: ignore[attr-defined]
    return list(itertools.pairwise(offsets))
