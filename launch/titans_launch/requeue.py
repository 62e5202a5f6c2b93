"""`titans-dist requeue NAME`: let the job of a run save, end and begin again as soon as there is room."""

from __future__ import annotations

from pathlib import Path

from titans_dist.config import Config
from titans_launch import submitted
from titans_launch.schedulers.job import remember


def run(config: Config) -> None:
    """Requeue it."""
    scheduler, submission = submitted.find(config)
    scheduler.requeue(submission)
    remember(Path(submission.run_dir), submission)
    print(f"requeued {config.name} as {', '.join(submission.ids)} of {submission.backend}")
