"""Which rows make the global batch of a step: a pure function of (seed, dataset, mixture, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from titans_data.errors import DataError
from titans_data.mixture import Mixture

SHUFFLE_SHARDS = 16
_ROUNDS = 8


class Schedule(Protocol):
    """An order of `num_rows` rows, `global_batch` of them per step."""

    mixture: Mixture

    @property
    def num_rows(self) -> int: ...

    @property
    def global_batch(self) -> int: ...

    def rows(self, step: int) -> np.ndarray:
        """The int64 (global_batch,) row indices of a step, which counts from 0."""

    def continues(self, step: int) -> np.ndarray:
        """Bool (global_batch,): whether each row goes on where the one in its place in the step before has ended."""

    def drawn(self, step: int) -> list[int]:
        """How many rows each source of the mixture has given before `step`."""

    def unread(self, step: int) -> list[int]:
        """How many rows of each source have not been given before `step`."""


class RowOrder:
    """The order in which one dataset gives its rows: epoch after epoch, each row exactly once per epoch.

    Position n is position n % num_rows of epoch n // num_rows, and every epoch has its own order. Nothing is
    remembered: any position is found by arithmetic.

    `shards`, int64 (n + 1,) row numbers, says where the shards begin and end. An epoch takes them in random order,
    `window` of them at a time, and shuffles the rows of such a window: a reader works in `window` shards until they
    are read to the end. A dataset of `window` shards or fewer is shuffled as a whole.

    Raises DataError when a setting cannot be.
    """

    def __init__(
        self, num_rows: int, seed: int, shards: np.ndarray | None = None, window: int = SHUFFLE_SHARDS
    ) -> None:
        if num_rows < 1:
            raise DataError(f"num_rows is {num_rows}: give at least 1")
        if seed < 0:
            raise DataError(f"data seed is {seed}: give 0 or more")
        if window < 1:
            raise DataError(f"the shuffle window is {window} shards: give at least 1")
        self.num_rows = num_rows
        self._seed = seed
        self._window = window
        borders = np.array([0, num_rows], np.int64) if shards is None else np.unique(shards)
        self._borders = borders if len(borders) - 1 > window else np.array([0, num_rows], np.int64)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The row at each of `positions`, both int64 (n,)."""
        epochs, inside = np.divmod(positions, self.num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._in_epoch(int(epoch), inside[chosen])
        return rows

    def _in_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        known = self._epoch  # another thread may put its own epoch there
        if known is None or known[0] != epoch:
            known = self._epoch = (epoch, *self._shard_order(epoch))
        _, order, ends = known
        # Shards of a window lie side by side in `order`; a place in the window is shuffled, then found in its shard.
        windows = np.searchsorted(ends, positions, side="right") // self._window
        places = np.empty_like(positions)
        for window in np.unique(windows):
            chosen = windows == window
            first = int(ends[window * self._window - 1]) if window else 0
            size = int(ends[min((window + 1) * self._window, len(ends)) - 1]) - first
            places[chosen] = first + permute(positions[chosen] - first, size, self._seed, epoch, int(window))
        held = np.searchsorted(ends, places, side="right")
        shards = order[held]
        return self._borders[shards + 1] - (ends[held] - places)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the number of rows up to the end of each, int64 (n,)."""
        count = len(self._borders) - 1
        order = permute(np.arange(count), count, self._seed, epoch, purpose=3)
        return order, np.cumsum(np.diff(self._borders)[order])


class BatchSchedule:
    """Shuffled rows of several datasets, mixed: the row numbers of the second follow those of the first, and so on.

    Nothing is remembered from step to step: to resume is to ask for another step, on any number of ranks.

    Raises DataError when the mixture is not of as many sources as there are orders.
    """

    def __init__(self, mixture: Mixture, orders: Sequence[RowOrder]) -> None:
        if len(orders) != len(mixture.names):
            raise DataError(
                f"the mixture has {len(mixture.names)} sources and {len(orders)} are there: make them equal"
            )
        self.mixture = mixture
        self.global_batch = mixture.global_batch
        self._orders = tuple(orders)
        self._offsets = np.cumsum([0, *(order.num_rows for order in orders)])
        self.num_rows = int(self._offsets[-1])

    def rows(self, step: int) -> np.ndarray:
        """The int64 (global_batch,) row indices of a step, which counts from 0."""
        sources, positions = self.mixture.draw(step)
        rows = np.empty_like(positions)
        for source in np.unique(sources):
            chosen = sources == source
            rows[chosen] = self._offsets[source] + self._orders[source].rows(positions[chosen])
        return rows

    def continues(self, step: int) -> np.ndarray:
        """Bool (global_batch,), all false: rows come shuffled, each for itself."""
        return np.zeros(self.global_batch, bool)

    def drawn(self, step: int) -> list[int]:
        """How many rows each source has given before `step`."""
        return self.mixture.drawn(step)

    def unread(self, step: int) -> list[int]:
        """How many rows of each source have not been given before `step`."""
        sizes = (order.num_rows for order in self._orders)
        return [max(size - drawn, 0) for size, drawn in zip(sizes, self.drawn(step), strict=True)]


def source_seed(seed: int, fingerprint: str) -> int:
    """The seed of the order of one source: its own for every dataset, whatever it is mixed with or called."""
    return int.from_bytes(hashlib.sha256(f"{seed} {fingerprint}".encode()).digest()[:8], "big")


def permute(positions: np.ndarray, size: int, seed: int, epoch: int, window: int = 0, purpose: int = 2) -> np.ndarray:
    """Where each of `positions`, int64 in [0, size), goes in the permutation (seed, epoch, window) of size elements.

    A Feistel network over the next power of four, walked until it is back inside [0, size). A shuffled index array
    would need 8 bytes per row in every process and seconds at each epoch, and numpy does not promise that its
    shuffles stay the same from version to version, on which a resumed run depends.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.Philox(key=seed, counter=[0, epoch, window, purpose]).random_raw(_ROUNDS)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half_bits) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(words: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the input moves every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
