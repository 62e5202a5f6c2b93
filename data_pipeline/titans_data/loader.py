"""From a token source to the micro-batches of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from titans_data.errors import DataError
from titans_data.schedule import Schedule
from titans_data.sources import TokenSource

Batch = dict[str, torch.Tensor]


class TokenDataset(Dataset[Batch]):
    """A token stream cut into rows of sequence_length + 1 tokens.

    Row i is tokens[i * T : i * T + T + 1]: inputs are its first T tokens, targets its last T, and every token but the
    first of the stream is a target once (tokens after the last full row are left out).
    With `packed`, rows also say where documents start, for a model that keeps them apart.

    Raises DataError when the source is too short for one row.
    """

    def __init__(self, source: TokenSource, sequence_length: int, packed: bool = False) -> None:
        if sequence_length < 1:
            raise DataError(f"sequence_length is {sequence_length}: give at least 1")
        if source.num_tokens < sequence_length + 1:
            raise DataError(
                f"the data has {source.num_tokens} tokens and one row of sequence_length {sequence_length} needs "
                f"{sequence_length + 1}: give more text or a shorter sequence_length"
            )
        self.source = source
        self.sequence_length = sequence_length
        self.packed = packed

    def __len__(self) -> int:
        return (self.source.num_tokens - 1) // self.sequence_length

    def __getitem__(self, row: int) -> Batch:
        """The row for itself: see `row`."""
        return self.row(row)

    def row(self, row: int, continues: bool = False) -> Batch:
        """`tokens` int64 (T + 1,) and `documents` int32 (T + 1,) ids that count from 0 within the row.

        Of a packed dataset also `starts` bool (T,): the input tokens before which a model must forget. That is the
        first token of each document, and the first of the row unless it `continues` the row before it.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not one of the {len(self)} rows")
        assert row > 0 or not continues, "nothing comes before the first row"
        # Whether the first token starts a document is seen from the one before it.
        before = int(self.packed and continues)
        length = self.sequence_length + 1
        tokens, documents = self.source.read(row * self.sequence_length - before, length + before)
        item = {
            "tokens": torch.from_numpy(tokens[before:]),
            "documents": torch.from_numpy(documents[before:] - documents[before]),
        }
        if self.packed:
            starts = np.diff(documents, prepend=-1).astype(bool)
            item["starts"] = torch.from_numpy(starts[before : before + self.sequence_length])
        return item

    def stack(self, rows: Sequence[int], continues: Sequence[bool] | None = None) -> Batch:
        """Rows side by side: `tokens` int64 (b, T + 1), `documents` int32 (b, T + 1), and `starts` bool (b, T)."""
        items = [self.row(row, goes_on) for row, goes_on in zip(rows, continues or [False] * len(rows), strict=True)]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def batches(
    dataset: TokenDataset,
    schedule: Schedule,
    start_step: int,
    rank: int,
    world: int,
    micro_batch: int,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield (step, micro-batches) from start_step on, without end.

    Rank `rank` of `world` data-parallel ranks gets its consecutive slice of each global batch, cut into micro-batches
    of `tokens` int64 (micro_batch, T + 1), `documents` int32 (micro_batch, T + 1) and, of a packed dataset, `starts`
    bool (micro_batch, T). The slices of all ranks in rank order are the global batch, whatever `world` is. With
    `workers` processes, each reads `prefetch` micro-batches ahead. The global random state of torch is neither read
    nor moved.

    Raises DataError when the global batch does not divide evenly, the schedule is of another dataset, or while
    iterating when the source cannot be read.
    """
    if not 0 <= rank < world:
        raise DataError(f"data-parallel rank is {rank} of {world}: give a rank from 0 to {world - 1}")
    if micro_batch < 1 or schedule.global_batch % (world * micro_batch):
        raise DataError(
            f"global_batch {schedule.global_batch} is not a multiple of {world} data-parallel ranks * micro_batch "
            f"{micro_batch}: change one of them"
        )
    if schedule.num_rows != len(dataset):
        raise DataError(
            f"the schedule is for {schedule.num_rows} rows and the data has {len(dataset)}: make them equal"
        )
    if start_step < 0:
        raise DataError(f"start_step is {start_step}: give 0 or more")
    return _iterate(dataset, schedule, start_step, rank, world, micro_batch, workers, prefetch)


def _iterate(
    dataset: TokenDataset,
    schedule: Schedule,
    start_step: int,
    rank: int,
    world: int,
    micro_batch: int,
    workers: int,
    prefetch: int,
) -> Iterator[tuple[int, list[Batch]]]:
    per_step = schedule.global_batch // world // micro_batch

    def row_lists() -> Iterator[list[tuple[int, bool]]]:
        step = start_step
        while True:
            both = (schedule.rows(step), schedule.continues(step))
            rows, continues = (values.reshape(world, per_step, micro_batch)[rank].tolist() for values in both)
            for parts in zip(rows, continues, strict=True):
                yield list(zip(*parts, strict=True))
            step += 1

    loader = DataLoader(
        _Stacked(dataset),
        batch_sampler=row_lists(),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_unchanged,
        # Without its own generator the DataLoader draws a seed from torch's global one, and dropout after a resume
        # would differ from dropout in the run that was never stopped.
        generator=torch.Generator(),
    )
    micro_batches = iter(loader)
    step = start_step
    while True:
        yield step, [_raise_error(next(micro_batches)) for _ in range(per_step)]
        step += 1


class _Stacked(Dataset[Batch]):
    """Fetches whole micro-batches; a DataError is returned, because what a worker raises arrives as a traceback."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, rows: list[tuple[int, bool]]) -> Batch | DataError:
        try:
            return self._dataset.stack(*zip(*rows, strict=True))
        except DataError as error:
            return error


def _unchanged(value: Any) -> Any:
    return value


def _raise_error(value: Batch | DataError) -> Batch:
    if isinstance(value, DataError):
        raise value
    return value


def evaluation_batches(
    dataset: TokenDataset, rank: int, world: int, micro_batch: int, limit_rows: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's share of every row, once, in order.

    All ranks get the same number of micro-batches, as collectives need, each of full size: rows that only fill up are
    copies of row 0 marked in `valid` bool (micro_batch,). The rest is as in `batches`. With `limit_rows`, that many
    rows evenly spaced over the data stand for all.

    Raises DataError when a setting cannot be, or while iterating when the source cannot be read.
    """
    check_evaluation(rank, world, micro_batch, limit_rows)
    count = len(dataset) if limit_rows is None else min(limit_rows, len(dataset))
    rows = np.arange(count, dtype=np.int64) * len(dataset) // count
    padding = -count % (world * micro_batch)
    padded = np.concatenate([rows, np.zeros(padding, np.int64)])
    valid = np.arange(len(padded)) < count

    def share() -> Iterator[Batch]:
        for block in range(0, len(padded), world * micro_batch):
            mine = slice(block + rank * micro_batch, block + (rank + 1) * micro_batch)
            yield dataset.stack(padded[mine].tolist()) | {"valid": torch.from_numpy(valid[mine].copy())}

    return share()


def check_evaluation(rank: int, world: int, micro_batch: int, limit_rows: int | None) -> None:
    """Raise DataError for a setting of an evaluation that cannot be."""
    if not 0 <= rank < world:
        raise DataError(f"data-parallel rank is {rank} of {world}: give a rank from 0 to {world - 1}")
    if micro_batch < 1:
        raise DataError(f"evaluation micro_batch is {micro_batch}: give at least 1")
    if limit_rows is not None and limit_rows < 1:
        raise DataError(f"evaluation limit_rows is {limit_rows}: give at least 1, or None for all rows")
