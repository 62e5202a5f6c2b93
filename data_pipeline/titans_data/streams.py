"""Rows in the order of the stream, for a model that carries its state from one row to the next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from titans_data.errors import DataError
from titans_data.loader import Batch, Rows, check_evaluation
from titans_data.mixture import Mixture, Stage, first_rows
from titans_data.schedule import permute


class StreamSchedule:
    """`global_batch` lanes that read streams side by side, one row per step each.

    Each source is a ring of rows, read by as many lanes as its share of the mixture gives it. The lanes begin at equal
    distances on the ring, from a place that its seed chooses, and go round. So a document is never cut between two
    lanes. One turn of all lanes of a source together is an epoch; all epochs are alike, because another order would
    break the documents. The row numbers of the second source follow those of the first, and so on.

    A new stage of the mixture moves as few lanes as it can: a lane that stays with its source reads on, and one that
    changes begins in the longest stretch of its new source that no lane has read: where that begins, or where another
    lane is about to read it, in its middle.
    Nothing is remembered from step to step: to resume is to ask for another step, on any number of ranks.

    Raises DataError when a setting cannot be, or when a source is mixed in that gets no lane.
    """

    def __init__(self, mixture: Mixture, num_rows: Sequence[int], seeds: Sequence[int]) -> None:
        if not len(num_rows) == len(seeds) == len(mixture.names):
            raise DataError(
                f"the mixture has {len(mixture.names)} sources and {len(num_rows)} are there: make them equal"
            )
        if min(num_rows) < 1:
            raise DataError(f"num_rows is {min(num_rows)}: give at least 1")
        if min(seeds) < 0:
            raise DataError(f"data seed is {min(seeds)}: give 0 or more")
        self.mixture = mixture
        self.global_batch = mixture.global_batch
        self._sizes = tuple(num_rows)
        self._offsets = np.cumsum([0, *num_rows])
        self.num_rows = int(self._offsets[-1])
        self._stages = [(stage.step, lanes) for stage, lanes in self._deal(seeds)]

    def rows(self, step: int) -> np.ndarray:
        """The int64 (global_batch,) row indices of a step, which counts from 0."""
        return np.array([self._offsets[lane.source] + self._place(lane, step) for lane in self._lanes(step)])

    def continues(self, step: int) -> np.ndarray:
        """Bool (global_batch,): whether each row goes on where the row of its lane in the step before has ended."""
        return np.array([step > lane.step and self._place(lane, step) > 0 for lane in self._lanes(step)])

    def drawn(self, step: int) -> list[int]:
        """How many rows each source has given before `step`."""
        return [sum(stop - start for start, stop in stretches) for stretches in self._read(step)]

    def unread(self, step: int) -> list[int]:
        """How many rows of each source no lane has read before `step`."""
        return [
            sum(stop - start for start, stop in gaps(stretches, size))
            for stretches, size in zip(self._read(step), self._sizes, strict=True)
        ]

    def _lanes(self, step: int) -> list[_Lane]:
        return next(lanes for first, lanes in reversed(self._stages) if first <= step)

    def _place(self, lane: _Lane, step: int) -> int:
        return (lane.begin + step - lane.step) % self._sizes[lane.source]

    def _read(self, step: int, stages: Sequence[tuple[int, list[_Lane]]] | None = None) -> list[list[tuple[int, int]]]:
        """Of each source the stretches [start, stop) that lanes have read before `step`; a stop may be past the end."""
        stages = self._stages if stages is None else stages
        read: list[list[tuple[int, int]]] = [[] for _ in self._sizes]
        for (first, lanes), (end, _) in zip(stages, [*stages[1:], (step, [])], strict=True):
            if first < min(end, step):
                for lane in lanes:
                    start = self._place(lane, first)
                    read[lane.source].append((start, start + min(end, step) - first))
        return read

    def _deal(self, seeds: Sequence[int]) -> Iterator[tuple[Stage, list[_Lane]]]:
        """The lanes of each stage."""
        done: list[tuple[int, list[_Lane]]] = []
        for stage in self.mixture.stages:
            wanted = first_rows(stage.shares, self.global_batch)
            for name, share, count in zip(self.mixture.names, stage.shares, wanted, strict=True):
                if share and not count:
                    raise DataError(
                        f"{name} has a share of {share} in {sum(stage.shares)}, which is none of {self.global_batch} "
                        "streams: give it a larger weight or use a larger global batch"
                    )
            if not done:
                lanes = [
                    _Lane(source, int(turned + lane * size // count) % size, stage.step)
                    for source, (size, count, seed) in enumerate(zip(self._sizes, wanted, seeds, strict=True))
                    for turned in permute(np.zeros(1, np.int64), size, seed, epoch=0)
                    for lane in range(count)
                ]
            else:
                lanes = self._moved(done, wanted, stage.step)
            done.append((stage.step, lanes))
            yield stage, lanes

    def _moved(self, done: list[tuple[int, list[_Lane]]], wanted: Sequence[int], step: int) -> list[_Lane]:
        """The lanes from `step` on: `wanted` of each source, as many as can be where they were."""
        lanes: list[_Lane | None] = list(done[-1][1])
        read = self._read(step, done)
        for source, count in enumerate(wanted):
            for lane in [i for i, old in enumerate(lanes) if old is not None and old.source == source][count:]:
                lanes[lane] = None
        for source, count in enumerate(wanted):
            places = {self._place(lane, step) for lane in lanes if lane is not None and lane.source == source}
            missing = count - sum(lane is not None and lane.source == source for lane in lanes)
            for _ in range(missing):
                begin = _beginning(read[source], places, self._sizes[source])
                places.add(begin)
                lanes[lanes.index(None)] = _Lane(source, begin, step)
        return [lane for lane in lanes if lane is not None]


@dataclass(frozen=True)
class _Lane:
    source: int
    begin: int
    """The row it reads at `step`."""
    step: int


def gaps(stretches: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What [start, stop) stretches leave of a ring of `size`, in order; the last one may go on past the end."""
    edges = []
    for start, stop in stretches:
        if stop - start >= size:
            return []
        edges += [(start, min(stop, size))] if start < stop else []
        edges += [(0, stop - size)] if stop > size else []
    free, reached = [], 0
    for start, stop in sorted(edges):
        if start > reached:
            free.append((reached, start))
        reached = max(reached, stop)
    if reached < size:
        free.append((reached, size))
    # What is free at the end goes on at the beginning.
    if len(free) > 1 and free[0][0] == 0 and free[-1][1] == size:
        free = [*free[1:-1], (free[-1][0], size + free[0][1])]
    return free


def _beginning(read: Sequence[tuple[int, int]], places: set[int], size: int) -> int:
    """Where a new lane begins, given what was read and the `places` where lanes are about to read."""
    taken = sorted(places)
    free = gaps(read, size) or [(0, size)]
    # A lane that is about to read splits the stretch it stands in.
    cuts = [
        (start, stop)
        for begin, end in free
        for start, stop in itertools.pairwise(
            sorted({begin, end, *(p + turn for p in taken for turn in (0, size) if begin < p + turn < end)})
        )
    ]
    best = max(cuts, key=lambda cut: (_share(cut, places, size), -cut[0]))
    return (best[1] - _share(best, places, size)) % size


def _share(stretch: tuple[int, int], places: set[int], size: int) -> int:
    """How much of an unread stretch a new lane would get: the second half where another begins, else all."""
    length = stretch[1] - stretch[0]
    return max(length // 2, 1) if stretch[0] % size in places else length


def stream_evaluation_batches(
    dataset: Rows, rank: int, world: int, micro_batch: int, limit_rows: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's lanes of the stream, row after row, for a model that carries its state along each lane.

    world * micro_batch lanes share the rows evenly, in order. A lane whose first row goes on with a document reads, as
    rows that are not `valid`, that document from its beginning: every valid row is seen with all of its document that
    came before it, on any number of ranks. All ranks get the same number of micro-batches, of `tokens`, `documents`,
    `starts` and `valid` bool (micro_batch,); lanes that are done get copies of row 0. With `limit_rows`, the first
    rows alone.

    Raises DataError when a setting cannot be, or while iterating when the source cannot be read.
    """
    check_evaluation(rank, world, micro_batch, limit_rows)
    count = len(dataset) if limit_rows is None else min(limit_rows, len(dataset))
    lanes = world * micro_batch

    def share() -> Iterator[Batch]:
        borders = [lane * count // lanes for lane in range(lanes + 1)]
        begins = [_document_row(dataset, row) if row < count else row for row in borders[:-1]]
        steps = max(end - begin for begin, end in zip(begins, borders[1:], strict=True))
        mine = range(rank * micro_batch, (rank + 1) * micro_batch)
        for step in range(steps):
            rows = [begins[lane] + step for lane in mine]
            ends = [borders[lane + 1] for lane in mine]
            shown = [row if row < end else 0 for row, end in zip(rows, ends, strict=True)]
            continues = [row > begins[lane] for row, lane in zip(shown, mine, strict=True)]
            valid = [borders[lane] <= row < borders[lane + 1] for row, lane in zip(rows, mine, strict=True)]
            yield dataset.stack(shown, continues) | {"valid": torch.tensor(valid)}

    return share()


def _document_row(dataset: Rows, row: int) -> int:
    """The row in which the document of the first token of `row` begins."""
    if dataset.row(row, continues=row > 0)["starts"][0]:
        return row
    while row > 0:
        row -= 1
        if dataset.row(row, continues=row > 0)["starts"].any():
            break
    return row
