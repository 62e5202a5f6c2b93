"""What there is to measure, as pieces of work that any worker can do in any order, and what comes out of one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from titans_dist.config import EvaluationConfig
from titans_dist.config.evaluation import HARNESS

DOCUMENT = 256
"""Tokens to read for a document of a task without a length, about; for the progress alone."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """The samples first .. first + count - 1 of a task at a length: what one worker does at a time."""

    task: str
    length: int
    """Tokens of the context; 0 for a task that has no such length, which is one piece."""
    seed: int
    first: int
    count: int

    @property
    def tokens(self) -> int:
        """Tokens there are to read, about."""
        return self.count * (self.length or DOCUMENT)

    @property
    def key(self) -> str:
        """The same for the same piece, on every machine."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        if not self.length:
            return f"{self.task}, at most {self.count:,} documents"
        return f"{self.task} at {self.length:,} tokens, samples {self.first} to {self.first + self.count - 1}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured."""

    scores: list[float]
    """Of each sample, 0 to 1; of a task that measures losses, the mean loss in nats per token."""
    samples: str
    """Digest of the samples: results are comparable where it is the same."""
    tokens: int
    """Tokens that the model has read and written."""
    seconds: float
    """For that, without what it took to make the samples."""
    peak_bytes: int
    """Largest memory of the worker's process, or of its GPU."""
    detail: dict[str, Any]
    """What the task wants to keep of each sample, such as depths and answers, as JSON."""


def pieces(settings: EvaluationConfig, tasks: list[str] | None = None) -> list[Piece]:
    """All pieces of work, whole tasks and the long ones first: the last to end should be short."""
    found = []
    for task in settings.tasks if tasks is None else tasks:
        if task.startswith(HARNESS):
            found.append(Piece(task, 0, settings.seed, 0, settings.samples))
            continue
        for length in settings.lengths:
            for first in range(0, settings.samples, settings.shard):
                count = min(settings.shard, settings.samples - first)
                found.append(Piece(task, length, settings.seed, first, count))
    return sorted(found, key=lambda piece: -(piece.length or math.inf))
