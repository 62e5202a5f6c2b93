"""The job of a run that `submit` has handed in."""

from __future__ import annotations

from pathlib import Path

from titans_dist.config import Config, UserError
from titans_launch import schedulers, tables
from titans_launch.schedulers.job import Scheduler, Submission, remembered


def find(config: Config) -> tuple[Scheduler, Submission]:
    """What was submitted last, and to whom. Raises UserError where nothing was."""
    run_dir = Path(config.run_dir)
    submission = remembered(run_dir)
    if submission is None:
        there = sorted(path.parents[1].name for path in run_dir.parent.glob("*/submit/submission.json"))
        mend = f"those that were: {', '.join(there)}" if there else "submit it with titans-dist submit name=NAME"
        raise UserError(f"{tables.place(run_dir)} was not submitted; {mend}")
    return schedulers.named(submission.backend), submission
