"""`titans-dist status NAME`: what the scheduler says of a run's job, and what the run says itself."""

from __future__ import annotations

import time
from pathlib import Path

from titans_dist.config import Config
from titans_launch import submitted, tables


def run(config: Config) -> None:
    """Print both."""
    from titans_dist.run.postmortem import last_step
    from titans_dist.tracking.evaluations import newest

    scheduler, submission = submitted.find(config)
    run_dir = Path(submission.run_dir)
    status, step, measured = run_dir / "STATUS", last_step(run_dir), newest(run_dir)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(submission.time))
    rows = [
        ("run", tables.place(run_dir)),
        ("says of itself", status.read_text().strip() if status.exists() else "nothing yet"),
        *([("last step", f"{step:,}")] if step is not None else []),
        *([("last evaluation", measured)] if measured is not None else []),
        ("submitted", f"{submission.command} to {submission.backend}, {when}"),
    ]
    for state in scheduler.states(submission) or []:
        rows.append((state.id, " ".join(filter(None, (state.state, state.detail)))))
    tables.show(config.name, rows)
