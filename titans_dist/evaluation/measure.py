"""One piece of work, measured leg by leg: a long document may change its worker after every leg.

What has been read so far is data (`Progress`): the worker that goes on with it need not be the one that began.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titans_dist.config import ConfigError
from titans_dist.evaluation.harness.questions import Questions
from titans_dist.evaluation.harness.tasks import is_harness
from titans_dist.evaluation.samples import Samples, Stored
from titans_dist.evaluation.work import Piece, Result
from titans_dist.model import flatten, unflatten
from titans_dist.parallel.reader import Reader

LEG = 1 << 18
"""Tokens that a worker reads before it hands over: what is lost when it dies, and how often others get their turn."""
POSITIONS = "positions"
"""The task that measures losses on the held-out text by position, instead of answers."""


@dataclasses.dataclass
class Progress:
    """How far a piece is. Goes from worker to worker."""

    sample: int = 0
    """Samples that are done."""
    read: int = 0
    """Tokens of the next one that have been read."""
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """The model's state after them, of this process of the copy; empty at the start of a sample."""
    scores: list[float] = dataclasses.field(default_factory=list)
    detail: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    answers: list[Any] = dataclasses.field(default_factory=list)
    """Of a task of the harness: what was answered to each sample; all are scored at the end."""
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the sample that is being read: sum of its losses by the bin of the position."""
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Material:
    """What samples are made of."""

    samples: Samples | None
    """None where the tokens have no text: then only losses can be measured."""
    held_out: Callable[[int, int], Tensor]
    """The held-out tokens from a start on, so many, int64."""
    held_out_tokens: int
    bytes_per_token: float | None = None
    """Of the held-out text, on average; None where it is unknown."""
    task_folder: str | None = None
    """Task files of the harness."""


def bin_of(position: int) -> str:
    """Positions count together from one power of two to the next; named by the first of them.

    >>> [bin_of(position) for position in (0, 1, 5, 4096)]
    ['0', '1', '4', '4096']
    """
    return str(1 << (position.bit_length() - 1) if position else 0)


class Measuring:
    """A worker's way through pieces. With tensor parallelism all processes of a copy do the same at the same time."""

    def __init__(self, reader: Reader, material: Material, leg: int = LEG) -> None:
        self.reader, self.material, self.leg = reader, material, leg
        self._kept: tuple[str, Any] = ("", [])

    def advance(self, piece: Piece, progress: Progress) -> Progress | Result:
        """Read at most about one leg; the result once all samples are done. Raises ConfigError for what cannot fit."""
        samples = self._samples(piece)
        started, budget = time.perf_counter(), self.leg
        while progress.sample < len(samples) and budget > 0:
            before = progress.tokens
            if piece.task == POSITIONS:
                self._read_losses(samples[progress.sample], progress, budget)
            elif is_harness(piece.task):
                self._answer(samples, progress)
            else:
                self._read_question(samples, progress, budget)
            budget -= progress.tokens - before
        progress.seconds += time.perf_counter() - started
        progress.peak_bytes = max(progress.peak_bytes, self._memory_bytes())
        if progress.sample < len(samples):
            return progress
        if is_harness(piece.task):
            progress.scores, sampled, progress.detail = samples.outcome(progress.answers)
        else:
            sampled = self._digest(piece, samples)
        return Result(
            scores=progress.scores,
            samples=sampled,
            tokens=progress.tokens,
            seconds=progress.seconds,
            peak_bytes=progress.peak_bytes,
            detail=dict(progress.detail),
        )

    def _read_question(self, stored: Stored, progress: Progress, budget: int) -> None:
        """Part of the prompt; behind its end the answer and its score."""
        sample, prompt_tokens = stored[progress.sample], stored.lengths[progress.sample]
        questions = self.material.samples
        assert questions is not None  # the driver has seen to it
        task, tokenizer = questions.tasks[sample.task], questions.tokenizer
        if prompt_tokens + sample.new_tokens > sample.length:
            raise ConfigError(
                f"{sample.task} has {prompt_tokens} tokens and an answer of {sample.new_tokens}, which is more than "
                f"its {sample.length}; nothing is ever cut off: use greater evaluation.lengths"
            )
        part = torch.from_numpy(stored.tokens(progress.sample, progress.read, budget).astype("int64"))
        logits, state = self.reader.read(part, self._state(progress))
        progress.read += len(part)
        progress.tokens += len(part)
        if progress.read < prompt_tokens:
            progress.state = _on_cpu(state)
            return
        answer = self.reader.go_on(logits, state, sample.new_tokens, [tokenizer.end_of_document], tokenizer.vocab_size)
        progress.tokens += len(answer)
        output = tokenizer.decode(answer)
        kept = {"depths": sample.depths, "answers": sample.answers, "output": output, "prompt_tokens": prompt_tokens}
        self._next(progress, task.score(sample, output), kept)

    def _read_losses(self, window: tuple[int, int], progress: Progress, budget: int) -> None:
        """Part of a stretch of the held-out text; behind its end the mean loss."""
        start, length = window
        count = min(budget, length - progress.read)
        tokens = self.material.held_out(start + progress.read, count + 1)
        after, position = self._state(progress), progress.read
        for losses, state in self.reader.losses(tokens, after):
            for begin, part in _by_bin(position, losses):
                progress.sums[begin] = progress.sums.get(begin, 0.0) + part.double().sum().item()
            position += len(losses)
            after = state
        progress.read += count
        progress.tokens += count
        if progress.read < length:
            progress.state = _on_cpu(after)
            return
        kept = {"losses": progress.sums, "bytes_per_token": self.material.bytes_per_token}
        self._next(progress, math.fsum(progress.sums.values()) / length, kept)

    def _answer(self, questions: Questions, progress: Progress) -> None:
        """All requests of one context."""
        answers, tokens = questions.answer(progress.sample)
        progress.answers.append(answers)
        progress.tokens += tokens
        progress.sample += 1

    def _next(self, progress: Progress, score: float, kept: dict[str, Any]) -> None:
        progress.scores.append(score)
        for name, value in kept.items():
            progress.detail.setdefault(name, []).append(value)
        progress.sample, progress.read, progress.state, progress.sums = progress.sample + 1, 0, {}, {}

    def _state(self, progress: Progress) -> Any:
        start = self.reader.start()
        return unflatten(progress.state, start) if progress.state else start

    def _samples(self, piece: Piece) -> Any:
        """The samples of a piece, the stretches of the held-out text, or the questions of a task of the harness; those
        of the last piece are kept."""
        key, kept = self._kept
        if key == piece.key:
            return kept
        if piece.task == POSITIONS:
            made: Any = windows(piece, self.material.held_out_tokens)
        else:
            assert self.material.samples is not None
            if is_harness(piece.task):
                made = Questions(piece, self.material.task_folder, self.reader, self.material.samples.tokenizer)
            else:
                made = self.material.samples.of(piece)
        self._kept = piece.key, made
        return made

    def _digest(self, piece: Piece, samples: Any) -> str:
        if piece.task != POSITIONS:
            digest: str = samples.digest
            return digest
        found = hashlib.sha256()
        for start, length in samples:
            for at in range(0, length + 1, LEG):  # the token behind the stretch is one that is predicted
                found.update(self.material.held_out(start + at, min(LEG, length + 1 - at)).numpy().tobytes())
        return found.hexdigest()

    def _memory_bytes(self) -> int:
        if self.reader.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.reader.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _on_cpu(state: Any) -> dict[str, Tensor]:
    # Copies: what is a view of something larger would otherwise travel with all of it.
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in flatten(state).items()}


def windows(piece: Piece, tokens: int) -> list[tuple[int, int]]:
    """Where the stretches of a piece begin: they follow each other, so that no token counts twice at one length.

    Raises ConfigError where the text has not one of the length.
    """
    there = (tokens - 1) // piece.length
    if there == 0:
        raise ConfigError(
            f"the held-out text has {tokens:,} tokens, too few for {POSITIONS} at {piece.length:,}; use smaller "
            "evaluation.lengths or a dataset with a larger data.validation_fraction"
        )
    return [(index * piece.length, piece.length) for index in range(piece.first, min(piece.first + piece.count, there))]


def _by_bin(position: int, losses: Tensor) -> list[tuple[str, Tensor]]:
    """Losses from `position` on, cut where a bin ends."""
    found, at = [], 0
    while at < len(losses):
        begin = int(bin_of(position + at))
        end = min(len(losses), (2 * begin if begin else 1) - position)
        found.append((str(begin), losses[at:end]))
        at = end
    return found
