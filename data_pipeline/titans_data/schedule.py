"""Which rows make the global batch of a step: a pure function of (seed, step)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from titans_data.errors import DataError

_ROUNDS = 8


class Schedule(Protocol):
    """An order of `num_rows` rows, `global_batch` of them per step."""

    @property
    def num_rows(self) -> int: ...

    @property
    def global_batch(self) -> int: ...

    def rows(self, step: int) -> np.ndarray:
        """The int64 (global_batch,) row indices of a step, which counts from 0."""

    def continues(self, step: int) -> np.ndarray:
        """Bool (global_batch,): whether each row goes on where the one in its place in the step before has ended."""


class BatchSchedule:
    """Epoch after epoch over `num_rows` rows, `global_batch` rows per step, each row exactly once per epoch.

    Sample number n = step * global_batch + j is position n % num_rows of epoch n // num_rows, and every epoch has its
    own order. Nothing is remembered from step to step: to resume is to ask for another step, on any number of ranks.

    Raises DataError when a setting cannot be.
    """

    def __init__(self, num_rows: int, global_batch: int, seed: int, shuffle: bool = True) -> None:
        check_schedule(num_rows, global_batch, seed)
        self.num_rows = num_rows
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle

    def rows(self, step: int) -> np.ndarray:
        """The int64 (global_batch,) row indices of a step, which counts from 0."""
        samples = step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        epochs, positions = np.divmod(samples, self.num_rows)
        if not self.shuffle:
            return positions
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            rows[inside] = permute(positions[inside], self.num_rows, self.seed, int(epoch))
        return rows

    def continues(self, step: int) -> np.ndarray:
        """Bool (global_batch,), all false: rows come shuffled, each for itself."""
        return np.zeros(self.global_batch, bool)


def check_schedule(num_rows: int, global_batch: int, seed: int) -> None:
    """Raise DataError for a setting of a schedule that cannot be."""
    if num_rows < 1:
        raise DataError(f"num_rows is {num_rows}: give at least 1")
    if global_batch < 1:
        raise DataError(f"global_batch is {global_batch}: give at least 1")
    if seed < 0:
        raise DataError(f"data seed is {seed}: give 0 or more")


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of `positions`, int64 in [0, size), goes in the permutation number (seed, epoch) of size elements.

    A Feistel network over the next power of four, walked until it is back inside [0, size). A shuffled index array
    would need 8 bytes per row in every process and seconds at each epoch, and numpy does not promise that its
    shuffles stay the same from version to version, on which a resumed run depends.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.Philox(key=seed, counter=[0, epoch, 0, 2]).random_raw(_ROUNDS)
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
