"""Which dataset each row of a step comes from: a pure function of (mixture, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from titans_data.errors import DataError


@dataclass(frozen=True)
class Stage:
    """What rows are mixed of from a step on."""

    step: int
    """The first step of the stage; steps count from 0."""
    shares: tuple[int, ...]
    """Of each source in turn: how many of every sum(shares) rows it gives."""


class Mixture:
    """`global_batch` rows per step, drawn from several sources, stage after stage.

    Within a stage, row k of a source with share w comes at time (2k + 1) / 2w, and the rows of all sources follow each
    other in the order of their times (of equal times, in the order of the sources). So any stretch of n rows has
    n * w / sum(shares) rows of each source, to less than as many rows as there are sources. What a source has given is
    counted on from stage to stage: its rows are drawn one after the other whatever it is mixed with.

    Raises DataError when a setting cannot be.
    """

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], global_batch: int) -> None:
        if global_batch < 1:
            raise DataError(f"global_batch is {global_batch}: give at least 1")
        if not names or len(set(names)) != len(names):
            raise DataError(f"the sources of the mixture are {list(names)}: give at least one, each with its own name")
        if not stages or stages[0].step != 0:
            raise DataError("the mixture has no stage that begins at step 0: let the first stage begin there")
        for before, stage in zip((None, *stages), stages, strict=False):
            if before is not None and stage.step <= before.step:
                raise DataError(
                    f"a stage of the mixture begins at step {stage.step} after one that begins at step {before.step}: "
                    "give every stage at least one step"
                )
            if len(stage.shares) != len(names) or min(stage.shares) < 0 or not any(stage.shares):
                raise DataError(
                    f"the mixture has the shares {stage.shares} for {len(names)} sources: give each source a share of "
                    "0 or more, and one of them more than 0"
                )
        self.names = tuple(names)
        self.stages = tuple(stages)
        self.global_batch = global_batch

    @staticmethod
    def of_one(global_batch: int, name: str = "main") -> Mixture:
        """The mixture of a single source."""
        return Mixture([name], [Stage(0, (1,))], global_batch)

    def spans(self, step: int) -> Iterator[tuple[Stage, int]]:
        """The stages that began before `step`, each with its number of steps before `step`."""
        ends = [*(stage.step for stage in self.stages[1:]), step]
        for stage, end in zip(self.stages, ends, strict=True):
            if stage.step < step:
                yield stage, min(end, step) - stage.step

    def drawn(self, step: int) -> list[int]:
        """How many rows each source has given before `step`."""
        total = [0] * len(self.names)
        for stage, steps in self.spans(step):
            for source, count in enumerate(first_rows(stage.shares, steps * self.global_batch)):
                total[source] += count
        return total

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a step: source int64 (global_batch,), and position int64 (global_batch,) in the source's order.

        The position counts all rows that the source has given before, in earlier stages too.
        """
        stage = next(stage for stage in reversed(self.stages) if stage.step <= step)
        earlier = self.drawn(stage.step)
        done = (step - stage.step) * self.global_batch
        first, last = (first_rows(stage.shares, rows) for rows in (done, done + self.global_batch))
        scale = _scale(stage.shares)
        times = [
            ((2 * row + 1) * scale[source], source, row)
            for source in range(len(self.names))
            for row in range(first[source], last[source])
        ]
        if sum(share > 0 for share in stage.shares) > 1:
            times.sort()
        sources = np.array([source for _, source, _ in times], np.int64)
        positions = np.array([earlier[source] + row for _, source, row in times], np.int64)
        return sources, positions


def first_rows(shares: Sequence[int], rows: int) -> list[int]:
    """How many of the first `rows` rows of a stage each source gives."""
    total = sum(shares)
    # All rows that come up to the time rows / total: at most one per source more or fewer than wanted.
    taken = [(2 * rows * share + total) // (2 * total) for share in shares]
    scale = _scale(shares)
    mixed = [source for source, share in enumerate(shares) if share]
    while sum(taken) > rows:
        taken[max((i for i in mixed if taken[i]), key=lambda i: ((2 * taken[i] - 1) * scale[i], i))] -= 1
    while sum(taken) < rows:
        taken[min(mixed, key=lambda i: ((2 * taken[i] + 1) * scale[i], i))] += 1
    return taken


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion as `weights`, each read as it is written: 0.7 is 7 / 10.

    Raises DataError for a weight that is negative or not finite, or when all are 0.
    """
    try:
        exact = [Fraction(str(weight)) for weight in weights]
    except (ValueError, ZeroDivisionError):
        exact = [Fraction(-1)]
    if min(exact, default=-1) < 0 or not any(exact):
        raise DataError(f"the weights of the mixture are {list(weights)}: give numbers of 0 or more, one of them above")
    common = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = np.gcd.reduce(np.array(whole, object))
    return tuple(int(weight // divisor) for weight in whole)


def _scale(shares: Sequence[int]) -> list[int]:
    """Whole numbers proportional to 1 / share, so that times are compared exactly."""
    common = lcm(*(share for share in shares if share))
    return [common // share if share else 0 for share in shares]
