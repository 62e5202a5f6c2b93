"""Rows in the order of the stream, for a model that carries its state from one row to the next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from titans_data.loader import Batch, TokenDataset, check_evaluation
from titans_data.schedule import check_schedule, permute


class StreamSchedule:
    """`global_batch` lanes that read the stream side by side, one row per step each.

    The stream is a ring of `num_rows` rows. The lanes begin at equal distances on it, from a place that `seed` chooses,
    and go round: lane j is at row (begin_j + step) % num_rows. So a document is never cut between two lanes, and every
    num_rows steps each lane has read every row once. One turn of all lanes together, num_rows / global_batch steps, is
    an epoch; all epochs are alike, because another order would break the documents.
    Nothing is remembered from step to step: to resume is to ask for another step, on any number of ranks.

    Raises DataError when a setting cannot be.
    """

    def __init__(self, num_rows: int, global_batch: int, seed: int) -> None:
        check_schedule(num_rows, global_batch, seed)
        self.num_rows = num_rows
        self.global_batch = global_batch
        turned = permute(np.zeros(1, np.int64), num_rows, seed, epoch=0)
        self._begins = turned + np.arange(global_batch, dtype=np.int64) * num_rows // global_batch

    def rows(self, step: int) -> np.ndarray:
        """The int64 (global_batch,) row indices of a step, which counts from 0."""
        return (self._begins + step) % self.num_rows

    def continues(self, step: int) -> np.ndarray:
        """Bool (global_batch,): whether each row goes on where the row of its lane in the step before has ended."""
        return (self.rows(step) > 0) & (step > 0)


def stream_evaluation_batches(
    dataset: TokenDataset, rank: int, world: int, micro_batch: int, limit_rows: int | None = None
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


def _document_row(dataset: TokenDataset, row: int) -> int:
    """The row in which the document of the first token of `row` begins."""
    if dataset.row(row, continues=row > 0)["starts"][0]:
        return row
    while row > 0:
        row -= 1
        if dataset.row(row, continues=row > 0)["starts"].any():
            break
    return row
