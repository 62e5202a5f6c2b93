"""Out of the rows of a ledger: one line for each task and length, with how far it can be trusted."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from titans_dist.evaluation.harness.tasks import is_harness
from titans_dist.evaluation.ledger import Row
from titans_dist.evaluation.measure import POSITIONS

Z = statistics.NormalDist().inv_cdf(0.975)
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class Line:
    """What was measured of one task at one length."""

    task: str
    length: int
    count: int
    """Samples."""
    mean: float
    """Share of right answers; of `positions` the loss in nats per token."""
    low: float
    high: float
    """95 % interval of the mean."""
    tokens: int
    seconds: float
    peak_bytes: int
    is_loss: bool = False
    """Whether less is better."""


@dataclass(frozen=True)
class Metric:
    """What lm-evaluation-harness itself makes of a task."""

    task: str
    version: str
    """Of the task, by the harness."""
    documents: int
    """How many were read."""
    of: int
    """How many there are."""
    name: str
    value: float
    stderr: float | None


def metrics(rows: Iterable[Row]) -> list[Metric]:
    """Of the tasks lm/NAME, as they come."""
    return [
        Metric(
            row.piece.task,
            str(row.result.detail["task_version"]),
            row.result.detail["documents"],
            row.result.detail["of"],
            name,
            metric["value"],
            metric["stderr"],
        )
        for row in rows
        if is_harness(row.piece.task)
        for name, metric in row.result.detail["metrics"].items()
    ]


def lines(rows: Iterable[Row]) -> list[Line]:
    """In the order in which tasks come first, the short lengths first."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.piece.task, row.piece.length].append(row)
    order = list(dict.fromkeys(task for task, _ in found))
    return [
        _line(task, length, found[task, length])
        for task, length in sorted(found, key=lambda key: (order.index(key[0]), key[1]))
        if any(row.result.scores for row in found[task, length])
    ]


def _line(task: str, length: int, rows: list[Row]) -> Line:
    scores = [score for row in rows for score in row.result.scores]
    mean = statistics.fmean(scores)
    is_loss = task == POSITIONS or rows[0].result.detail.get("score") == "loss"
    low, high = _normal(scores) if is_loss else wilson(mean, len(scores))
    return Line(
        task,
        length,
        len(scores),
        mean,
        low,
        high,
        tokens=sum(row.result.tokens for row in rows),
        seconds=sum(row.result.seconds for row in rows),
        peak_bytes=max(row.result.peak_bytes for row in rows),
        is_loss=is_loss,
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` samples after Wilson; of graded scores a little too wide.

    >>> [round(x, 3) for x in wilson(1.0, 16)]
    [0.806, 1.0]
    """
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _normal(values: list[float]) -> tuple[float, float]:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    half = Z * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
