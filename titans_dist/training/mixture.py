"""What a changed mixture means for each source: up to now, and by the end of the run."""

from __future__ import annotations

from titans_data import usage
from titans_dist.config import Config
from titans_dist.run.data import TrainingData
from titans_dist.tracking import Tracker, human


def report_edit(tracker: Tracker, data: TrainingData, config: Config, step: int) -> None:
    """Print and note it, where the mixture is another one from after `step` on."""
    length, total = config.data.sequence_length, config.training.steps
    before, after = (usage(data.schedule, data.sources, end) for end in (step, total))
    print(f"the mixture is another one from step {step + 1} on", flush=True)
    for now, end in zip(before, after, strict=True):
        row = {
            "tokens": now.rows * length,
            "drawn": now.drawn * length,
            "drawn_at_end": end.drawn * length,
            "repeated_at_end": end.repeated * length,
            "unused_at_end": end.unread * length,
        }
        tracker.event("mixture", step=step, source=now.name, **row)
        print(
            f"  {now.name}: {human(row['drawn'])} of {human(row['tokens'])} tokens drawn so far; at step {total} "
            f"{human(row['drawn_at_end'])}, {human(row['repeated_at_end'])} of them repeated and "
            f"{human(row['unused_at_end'])} never used",
            flush=True,
        )
