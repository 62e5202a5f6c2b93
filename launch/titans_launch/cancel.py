"""`titans-dist cancel NAME`: end the job of a run for good; training saves first."""

from __future__ import annotations

from titans_dist.config import Config
from titans_launch import submitted


def run(config: Config) -> None:
    """Cancel it."""
    scheduler, submission = submitted.find(config)
    scheduler.cancel(submission)
    print(f"canceled {config.name} ({', '.join(submission.ids)} of {submission.backend})")
