"""The samples of a step, each with the place it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from titans_data.errors import DataError
from titans_data.schedule import Schedule
from titans_data.state import SourceIdentity


@dataclass(frozen=True)
class Sample:
    """One row of a global batch; everything counts from 0."""

    step: int
    slot: int
    """Its place in the global batch."""
    rank: int
    """The data-parallel rank that reads it."""
    source: int
    epoch: int
    """How many times its source had been given in whole before."""
    row: int
    """The row of the source."""
    continues: bool
    """Whether it goes on where the row in its slot of the step before has ended."""


def samples(schedule: Schedule, sources: Sequence[SourceIdentity], step: int, ranks: int) -> Iterator[Sample]:
    """The global batch of a step, which counts from 0, in order, as `ranks` data-parallel ranks share it.

    Raises DataError when they cannot share it evenly.
    """
    batch = schedule.global_batch
    if ranks < 1 or batch % ranks:
        raise DataError(f"global_batch {batch} is not a multiple of {ranks} data-parallel ranks: change one of them")
    borders = np.cumsum([0, *(source.rows for source in sources)])
    drawn = list(schedule.drawn(step))
    pairs = zip(schedule.rows(step).tolist(), schedule.continues(step).tolist(), strict=True)
    for slot, (row, continues) in enumerate(pairs):
        source = int(np.searchsorted(borders, row, side="right")) - 1
        epoch = drawn[source] // sources[source].rows
        drawn[source] += 1
        yield Sample(step, slot, slot * ranks // batch, source, epoch, row - int(borders[source]), continues)
