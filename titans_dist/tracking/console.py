"""The lines a person reads while a run goes on: plain text, the same in a terminal and in a log file."""

from __future__ import annotations

import sys
from typing import Any

from titans_dist.tracking.metrics import StepRow


class Console:
    """Prints one aligned line per logging interval, and one per event."""

    def __init__(self, total_steps: int, log_interval: int) -> None:
        self.total_steps = total_steps
        self.log_interval = log_interval
        self._step_time_s: float | None = None
        self._first = True

    def step(self, row: StepRow) -> None:
        """Print the line of this step if it is due; the first and the last step always are."""
        # A running mean forgets the slow first steps, and a single slow step does not move the estimate.
        seen = self._step_time_s
        self._step_time_s = row.step_time_s if seen is None else 0.9 * seen + 0.1 * row.step_time_s
        due = self._first or row.step % self.log_interval == 0 or row.step == self.total_steps
        self._first = False
        if due:
            _print(step_line(row, self.total_steps, (self.total_steps - row.step) * self._step_time_s))

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Print what happened beside the steps."""
        _print(" | ".join([name.replace("_", " "), *(_field(key, value) for key, value in fields.items())]))


def step_line(row: StepRow, total_steps: int, eta_s: float) -> str:
    """One line of fixed columns for one step."""
    width = len(str(total_steps))
    return " | ".join(
        [
            f"step {row.step:>{width}}/{total_steps}",
            f"loss {row.loss:7.4f}",
            f"{human(row.tokens_per_s):>6} tok/s",
            f"{human(row.tokens):>6} tokens",
            f"grad {row.grad_norm:6.2f}",
            f"lr {row.lr:.1e}",
            f"data {100 * row.data_wait:3.0f}%",
            f"{row.memory_bytes / 2**30:5.2f} GiB",
            f"eta {duration(eta_s)}",
        ]
    )


def human(count: float) -> str:
    """A count in at most six characters: 950, 12.3k, 1.2M, 4.6B, 1.1T."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 999.95:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def duration(seconds: float) -> str:
    """Two units are enough to plan by: 42s, 3m05s, 2h10m, 4d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def warn(text: str) -> None:
    """One line for something that does not stop the run."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _field(key: str, value: Any) -> str:
    if key == "seconds":
        return f"{value:.2f} s"
    if key == "bytes":
        return f"{human(value)}B"
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def _print(line: str) -> None:
    print(line, flush=True)
