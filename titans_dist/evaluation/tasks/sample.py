"""What a task is, and one question of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable
from typing import Protocol

from titans_data.tokenize import Tokenizer
from titans_dist.config import ConfigError
from titans_dist.evaluation.tasks.text import Text


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question: what the model reads, and what counts as right."""

    task: str
    length: int
    """Tokens that the prompt and the answer may have together."""
    seed: int
    index: int
    prompt: str
    """Everything the model reads, with the beginning of the answer where the task gives one."""
    answers: tuple[str, ...]
    """What is to be found in the output."""
    depths: tuple[float, ...]
    """Where what the answers rest on begins: the share of the prompt's tokens that come before it, in the order of
    the prompt. Nothing else that was hidden counts, so that accuracy by depth says how far back a model can recall."""
    new_tokens: int
    """Tokens the model may generate."""
    tokens: int
    """Tokens of the prompt by the tokenizer it was made with; with `new_tokens` never more than `length`."""


class Task(Protocol):
    """One benchmark task."""

    @property
    def name(self) -> str:
        """Under which it is asked for."""

    def sample(self, length: int, index: int, seed: int, tokenizer: Tokenizer, text: Text) -> Sample:
        """The question number `index`, always the same for the same arguments.

        Raises TaskDoesNotFit where even the shortest prompt is longer than `length`.
        """

    def score(self, sample: Sample, output: str) -> float:
        """How much of the output, what the model wrote after the prompt, is right: 0 to 1."""


class TaskDoesNotFit(ConfigError):
    """The length leaves no room for the question."""

    def __init__(self, task: str, length: int, least: int) -> None:
        super().__init__(
            f"{task} does not fit into {length} tokens of this tokenizer: this question and its answer need {least} at "
            "the least; give greater evaluation.lengths or leave the task out"
        )
        self.task, self.length, self.least = task, length, least

    def __reduce__(self) -> tuple[type[TaskDoesNotFit], tuple[str, int, int]]:
        return type(self), (self.task, self.length, self.least)  # so that it can come back from another process


def generator(task: str, length: int, index: int, seed: int) -> random.Random:
    """Random numbers of one question: the same in every process, and independent of those of all others."""
    return random.Random(hashlib.sha256(f"{task} {length} {index} {seed}".encode()).digest())


def digest(samples: Iterable[Sample]) -> str:
    """sha256 of the samples: results are comparable where it is the same."""
    found = hashlib.sha256()
    for sample in samples:
        line = json.dumps(dataclasses.asdict(sample), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        found.update(line.encode() + b"\n")
    return found.hexdigest()
