"""`titans-dist logs NAME`: what the job of a run has printed."""

from __future__ import annotations

from titans_dist.config import Config
from titans_launch import submitted


def run(config: Config, follow: bool = False) -> None:
    """Print it; with `follow` until the job is over."""
    scheduler, submission = submitted.find(config)
    scheduler.logs(submission, follow)
