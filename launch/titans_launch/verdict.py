"""Out of how its workers ended: how a job has ended, and who is suspected."""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

from titans_launch import attempts, worker
from titans_launch.attempts import Attempt, Report

_BLAMED = re.compile(r"titans-dist: ranks? (\d+)\b")
"""What a worker says whose collective broke begins with the rank that broke it."""


@dataclasses.dataclass(frozen=True)
class Suspect:
    """The rank that is to be looked at first."""

    rank: int
    host: str | None
    why: str
    """Words that go on after "rank 3"."""

    @property
    def place(self) -> str:
        """Such as "rank 3 on node7"."""
        return f"rank {self.rank}{f' on {self.host}' if self.host else ''}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a job has ended."""

    code: int
    text: str = ""
    """What the person who started it is told; may be empty."""
    suspect: Suspect | None = None


def suspect(attempt: Attempt, run_dir: Path, command: str) -> Suspect | None:
    """Whom an attempt that failed failed by, as far as anybody can tell."""
    if (final := attempt.final()) is not None:
        return Suspect(final.rank, final.host, f"was the first to say: {last_line(final.text)}")
    if dead := attempt.dead():
        # All workers of this launcher are on its own machine.
        return Suspect(dead[0], socket.gethostname(), _silence(attempt, dead[0], run_dir, command))
    failure = attempt.failure()
    return None if failure is None else blamed(failure, attempt.reports.values())


def blamed(failure: Report, reports: Collection[Report]) -> Suspect:
    """The rank that the first failure names, or its own."""
    named = _BLAMED.match(failure.text)
    rank = failure.rank if named is None else int(named[1])
    if rank == failure.rank:
        return Suspect(rank, failure.host, f"failed first: {last_line(failure.text)}")
    others = sum(1 for report in reports if (match := _BLAMED.match(report.text)) and int(match[1]) == rank)
    host = next((report.host for report in reports if report.rank == rank), None)
    return Suspect(rank, host, f"is named by {others} other{'s' * (others > 1)}: {last_line(failure.text)}")


def judge(attempts_: Sequence[Attempt], code: int, run_dir: Path, command: str, *, is_stopped: bool) -> Verdict:
    """The end of a job of this machine, from all starts of its workers and torchrun's exit code.

    `is_stopped` says that it was asked to stop while no worker could save: before they began, or after one had died.
    """
    for attempt in attempts_:
        if (final := attempt.final()) is not None:
            return Verdict(final.code, final.text, suspect(attempt, run_dir, command))
    last = attempts_[-1] if attempts_ else Attempt(0)
    failure = last.failure()
    if code == 0 and failure is None:
        return Verdict(0)
    if is_stopped:
        lost = "nothing was lost" if len(attempts_) < 2 and not last.dead() else "start it again to go on"
        return Verdict(3, f"titans-dist: stopped while the workers did not run, {lost}")
    if dead := last.dead():
        who = f"rank {', '.join(map(str, dead))}"
        text = f"titans-dist: {who} {_silence(last, dead[0], run_dir, command)}; see {run_dir / 'logs'}"
        return Verdict(1, text, suspect(last, run_dir, command))
    if failure is not None:
        return Verdict(failure.code, failure.text, suspect(last, run_dir, command))
    if (stopped := last.stopped()) is not None:
        return Verdict(3, stopped.text)
    return Verdict(1, f"titans-dist: torchrun ended without a word; see {run_dir / 'logs'}")


def last_line(text: str) -> str:
    """What an error comes down to: of a traceback its last line."""
    return (text.strip().splitlines() or ["nothing"])[-1].removeprefix("titans-dist: ")


def _silence(attempt: Attempt, rank: int, run_dir: Path, command: str) -> str:
    """Words for the end of a rank that has not reported one."""
    status = attempt.status(rank)
    if status is not None and status > 0 and (words := _last_words(worker.log_path(run_dir, command, rank))):
        return f"ended itself: {words}"
    return f"ended without a word ({attempts.how(status)})"


def _last_words(log: Path) -> str | None:
    """What a process said to its log that could not end in an orderly way."""
    from titans_dist.run.postmortem import tail

    lines = tail(log).splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("titans-dist: ")]
    return last_line(said[-1]) if said else None
