"""From a token source to the micro-batches of one data-parallel rank."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from titans_data.errors import DataError
from titans_data.prefetch import Prefetch
from titans_data.schedule import Schedule
from titans_data.sources import TokenSource

Batch = dict[str, torch.Tensor]


class Rows(Dataset[Batch], ABC):
    """Rows of sequence_length + 1 tokens, by number."""

    sequence_length: int
    num_tokens: int
    bytes_per_token: float | None
    """Mean UTF-8 bytes that a token stands for, None when unknown."""
    is_remote: bool
    """Whether there is anything to fetch."""
    packed: bool
    """Whether batches say which document a token is of."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def row(self, row: int, continues: bool = False) -> Batch:
        """One row, which may go on where the row before it ended; see TokenDataset."""

    @abstractmethod
    def fetch(self, row: int) -> None:
        """Bring what a row needs to this machine."""

    def __getitem__(self, row: int) -> Batch:
        """The row for itself: see `row`."""
        return self.row(row)

    def stack(self, rows: Sequence[int], continues: Sequence[bool] | None = None) -> Batch:
        """Rows side by side: `tokens` int64 (b, T + 1); packed also `documents` int32 (b, T + 1), `starts` (b, T)."""
        items = [self.row(row, goes_on) for row, goes_on in zip(rows, continues or [False] * len(rows), strict=True)]
        names = ("tokens", "documents", "starts") if self.packed else ("tokens",)
        return {name: torch.stack([item[name] for item in items]) for name in names}


class TokenDataset(Rows):
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
        self.num_tokens = source.num_tokens
        self.bytes_per_token = source.bytes_per_token
        self.is_remote = source.is_remote

    @property
    def shards(self) -> np.ndarray:
        """Row numbers int64 (n + 1,) at which the shards of the source begin, by the first token of a row."""
        return np.minimum(-(-self.source.shards // self.sequence_length), len(self))

    def __len__(self) -> int:
        return (self.source.num_tokens - 1) // self.sequence_length

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

    def fetch(self, row: int) -> None:
        """Bring what a row needs to this machine."""
        self.source.fetch(int(row) * self.sequence_length, self.sequence_length + 1)


class MixedDataset(Rows):
    """The rows of several datasets: those of the second follow those of the first, and so on.

    A number stands for a dataset that is no longer there and had as many rows, none of which can be read.
    Raises DataError when the rows of the datasets differ in length or form.
    """

    def __init__(self, datasets: Sequence[TokenDataset | int]) -> None:
        self._datasets = tuple(datasets)
        present = [dataset for dataset in datasets if not isinstance(dataset, int)]
        forms = sorted({(dataset.sequence_length, dataset.packed) for dataset in present})
        if len(forms) != 1:
            raise DataError(f"the datasets of a mixture have rows of the forms {forms}: give all the same form")
        self.sequence_length, self.packed = forms[0]
        self.num_tokens = sum(dataset.num_tokens for dataset in present)
        sizes = [(dataset.bytes_per_token, dataset.num_tokens) for dataset in present]
        known = all(bytes_per_token is not None for bytes_per_token, _ in sizes)
        total = sum((bytes_per_token or 0.0) * tokens for bytes_per_token, tokens in sizes)
        self.bytes_per_token = total / self.num_tokens if known else None
        self.is_remote = any(dataset.is_remote for dataset in present)
        lengths = (dataset if isinstance(dataset, int) else len(dataset) for dataset in datasets)
        self._offsets = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Which dataset holds a row, and the number of the row there."""
        number = int(np.searchsorted(self._offsets, row, side="right")) - 1
        if not 0 <= row < len(self) or isinstance(self._datasets[number], int):
            raise IndexError(f"row {row} is not one of the {len(self)} rows that can be read")
        return number, int(row - self._offsets[number])

    def row(self, row: int, continues: bool = False) -> Batch:
        """The row of the dataset that holds it."""
        dataset, inside = self._find(row)
        return dataset.row(inside, continues and inside > 0)

    def fetch(self, row: int) -> None:
        """Bring what a row needs to this machine."""
        dataset, inside = self._find(row)
        dataset.fetch(inside)

    def _find(self, row: int) -> tuple[TokenDataset, int]:
        number, inside = self.locate(row)
        dataset = self._datasets[number]
        assert isinstance(dataset, TokenDataset)
        return dataset, inside


def batches(
    dataset: Rows,
    schedule: Schedule,
    start_step: int,
    rank: int,
    world: int,
    micro_batch: int,
    workers: int = 0,
    fetch_ahead: int = 32,
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield (step, micro-batches) from start_step on, without end.

    Rank `rank` of `world` data-parallel ranks gets its consecutive slice of each global batch, cut into micro-batches
    of `tokens` int64 (micro_batch, T + 1) and, of a packed dataset, `documents` int32 (micro_batch, T + 1) and `starts`
    bool (micro_batch, T). The slices of all ranks in rank order are the global batch, whatever `world` is. With
    `workers` processes, each reads two micro-batches ahead; of a remote dataset, the files for `fetch_ahead` more steps
    are brought to this machine meanwhile. The global random state of torch is neither read nor moved.

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
    return _iterate(dataset, schedule, start_step, rank, world, micro_batch, workers, fetch_ahead)


def _iterate(
    dataset: Rows,
    schedule: Schedule,
    start_step: int,
    rank: int,
    world: int,
    micro_batch: int,
    workers: int,
    fetch_ahead: int,
) -> Iterator[tuple[int, list[Batch]]]:
    per_step = schedule.global_batch // world // micro_batch

    def mine(values: np.ndarray) -> np.ndarray:
        return values.reshape(world, per_step, micro_batch)[rank]

    def row_lists() -> Iterator[list[tuple[int, bool]]]:
        for step in itertools.count(start_step):
            rows, continues = (mine(values).tolist() for values in (schedule.rows(step), schedule.continues(step)))
            for parts in zip(rows, continues, strict=True):
                yield list(zip(*parts, strict=True))

    loader = DataLoader(
        _Stacked(dataset),
        batch_sampler=row_lists(),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        collate_fn=_unchanged,
        # Without its own generator the DataLoader draws a seed from torch's global one, and dropout after a resume
        # would differ from dropout in the run that was never stopped.
        generator=torch.Generator(),
    )
    micro_batches = iter(loader)
    ahead = None
    if dataset.is_remote and fetch_ahead:  # after the loader processes are forked: a thread may hold a lock just then
        ahead = Prefetch(lambda step: mine(schedule.rows(step)).flat, dataset.fetch, start_step, fetch_ahead)
    try:
        for step in itertools.count(start_step):
            if ahead is not None:
                ahead.reading(step)
            yield step, [_raise_error(next(micro_batches)) for _ in range(per_step)]
    finally:
        if ahead is not None:
            ahead.stop()


class _Stacked(Dataset[Batch]):
    """Fetches whole micro-batches; a DataError is returned, because what a worker raises arrives as a traceback."""

    def __init__(self, dataset: Rows) -> None:
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
    dataset: Rows, rank: int, world: int, micro_batch: int, limit_rows: int | None = None
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
