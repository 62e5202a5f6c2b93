"""A job as every scheduler gets it, and what a scheduler is."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Protocol

from titans_dist.config import Config, UserError
from titans_launch import names

SUBMIT = "submit"
"""Folder in the run folder: what was handed in, and to whom."""
_RECORD = "submission.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is handed to a scheduler."""

    config: Config
    name: str
    """A DNS label made of the run's name."""
    run_dir: Path
    folder: Path
    """Where relative paths of the configuration begin: the current folder."""
    arguments: list[str]
    """Of `titans-dist`, the command first, without the run folder."""
    nodes: int
    per_node: int
    """Processes on each node."""
    code: Path | None
    """Copy of the source code that the job runs; None: the installed packages."""

    @property
    def command(self) -> str:
        """Such as train."""
        return self.config.submit.command

    def words(self, run_dir: Path | str) -> list[str]:
        """The command line after `titans-dist`, with the run folder that the job sees."""
        return [*self.arguments, names.place(run_dir)]


@dataclasses.dataclass(frozen=True)
class Submission:
    """What was handed in, as the run folder remembers it."""

    backend: str
    ids: list[str]
    """Names by which the scheduler knows the jobs."""
    name: str
    command: str
    time: float
    """Unix seconds."""
    run_dir: str
    files: list[str]
    """What was handed in, in the run folder."""
    namespace: str | None = None
    context: str | None = None


@dataclasses.dataclass(frozen=True)
class State:
    """How one job is, in the scheduler's own word."""

    id: str
    state: str
    is_over: bool
    """Whether the scheduler will do nothing more with it."""
    detail: str = ""
    """Why it waits, where it runs, how often it was started again."""


class Scheduler(Protocol):
    """Every method raises UserError, one sentence, where the scheduler cannot do it or is not there."""

    def render(self, job: Job) -> dict[str, str]:
        """Name of each file to make -> its text; the first is the one to read. Asks nobody."""

    def check(self, job: Job) -> None:
        """Refuse what the scheduler lacks, such as an unknown queue, before anything is handed in."""

    def submit(self, job: Job, files: list[Path]) -> list[str]:
        """Hand the files in; the ids of the jobs."""

    def states(self, submission: Submission) -> list[State]:
        """Of each job that the scheduler still knows."""

    def logs(self, submission: Submission, follow: bool) -> None:
        """Print what the job has printed; with `follow` go on until it is over."""

    def cancel(self, submission: Submission) -> None:
        """End the job for good; training saves first."""

    def requeue(self, submission: Submission) -> None:
        """End the job, which saves, and start it again as soon as there is room."""


def remember(run_dir: Path, submission: Submission) -> None:
    """Write down what was handed in; readers see all of it or what was there before."""
    path = run_dir / SUBMIT / _RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(submission), indent=1) + "\n")
    temporary.replace(path)


def remembered(run_dir: Path) -> Submission | None:
    """What was handed in last for this run folder; None: nothing. Raises UserError where that cannot be read."""
    path = run_dir / SUBMIT / _RECORD
    try:
        return Submission(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path} does not say what was submitted; delete it if no job of this run is left") from None


def submission(job: Job, ids: list[str], files: list[Path]) -> Submission:
    """The record of what has just been handed in."""
    cluster = job.config.cluster
    is_remote = cluster.backend in ("jobset", "trainjob")
    return Submission(
        backend=cluster.backend,
        ids=ids,
        name=job.name,
        command=job.command,
        time=time.time(),
        run_dir=str(job.run_dir),
        files=[path.name for path in files],
        namespace=cluster.kubernetes.namespace if is_remote else None,
        context=cluster.kubernetes.context if is_remote else None,
    )
