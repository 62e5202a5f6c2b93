"""Out of the rows of a ledger: one line for each task and length, with how far it can be trusted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The same where the spread is of only two values, of three and so on: Student's quantiles."""


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
    seeds: tuple[int, ...]
    samples: str
    """Digest of all samples: two lines are comparable where it is the same."""
    is_loss: bool = False
    """Whether less is better."""
    bytes_per_token: float | None = None
    """Of the text whose loss it is."""


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


def once(rows: Iterable[Row]) -> list[Row]:
    """The rows without the samples that a larger one has: suites overlap where they cut the same task apart otherwise.

    Stretches of a text and the documents of a task without a length are the same whatever the seed.
    """
    rows = list(rows)
    seen: set[tuple[str, str, int, int, int]] = set()
    found: dict[int, Row] = {}
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].result.scores)):
        piece, count = rows[number].piece, len(rows[number].result.scores)
        seed = piece.seed if piece.length and piece.task != POSITIONS else 0
        head = rows[number].measured.checkpoint, piece.task, piece.length, seed
        new = [i for i in range(count) if (*head, piece.first + i) not in seen]
        seen.update((*head, piece.first + i) for i in new)
        if new:
            found[number] = rows[number] if len(new) == count else _only(rows[number], new)
    return [found[number] for number in sorted(found)]


def _only(row: Row, which: list[int]) -> Row:
    """The row with some of its samples. Tokens and seconds stay those of all, as they were measured."""
    count = len(row.result.scores)
    detail = {
        name: [value[i] for i in which] if isinstance(value, list) and len(value) == count else value
        for name, value in row.result.detail.items()
    }
    result = dataclasses.replace(row.result, scores=[row.result.scores[i] for i in which], detail=detail)
    return dataclasses.replace(row, result=result)


def lines(rows: Iterable[Row]) -> list[Line]:
    """Of rows of one checkpoint, in the order in which tasks come first, the short lengths first."""
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
    low, high = _student(scores) if is_loss else wilson(mean, len(scores))
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
        seeds=tuple(sorted({row.piece.seed for row in rows})),
        samples=_digest(rows),
        is_loss=is_loss,
        bytes_per_token=bytes_per_token(rows),
    )


def bytes_per_token(rows: Iterable[Row]) -> float | None:
    """Of the held-out text that rows of `positions` are about; None of other tasks and where it is unknown."""
    known = [value for row in rows for value in row.result.detail.get("bytes_per_token", []) if value]
    return known[0] if known else None


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Of a loss in nats per token.

    >>> bits_per_byte(math.log(2), 4.0)
    0.25
    """
    return loss / math.log(2) / bytes_per_token


def _digest(rows: list[Row]) -> str:
    parts = sorted({(row.piece.first, len(row.result.scores), row.result.samples) for row in rows})
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(min(loss, 700))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` samples after Wilson; of graded scores a little too wide.

    >>> [round(x, 3) for x in wilson(1.0, 16)]
    [0.806, 1.0]
    """
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _student(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by the spread of a few values."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return -math.inf, math.inf
    half = (T[count - 2] if count - 2 < len(T) else Z) * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half
