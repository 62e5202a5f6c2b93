"""evaluation.jsonl: what `titans-dist evaluate --follow` has measured of a run, beside its metrics.jsonl.

Rows as in metrics.jsonl, of kind "evaluation": of a checkpoint (`step`, `tokens`, `checkpoint`, its digest) how good a
`task` went at a `length` of the context, 0 where it has none: the `mean` of so many `samples`, and `low` and `high` of
its 95 % interval. `measures` says of what: "score", the share of right answers, or "loss", in nats per token.

The follower alone writes this file. Training reads it, and sends it to wandb: a wandb run may have one writer at a
time, and that is training as long as it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_dist.tracking.metrics import parse

EVALUATIONS = "evaluation.jsonl"


class Evaluations:
    """The rows of the file as they come."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the run."""
        self.path = folder / EVALUATIONS
        self._read_bytes = 0

    def new(self) -> list[dict[str, Any]]:
        """The rows that have come since the last call, at first all; none while the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return [row for row in parse(whole) if row["kind"] == "evaluation"]


def for_wandb(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as one point of a curve over tokens."""
    length = f"/{row['length']}" if row["length"] else ""
    return {"tokens": row["tokens"], "step": row["step"], f"evaluation/{row['task']}{length}": row["mean"]}


def newest(folder: Path) -> str | None:
    """One line on the newest checkpoint that was measured; None where there is none."""
    rows = Evaluations(folder).new()
    if not rows:
        return None
    step = max(row["step"] for row in rows)
    found = {(row["task"], row["length"]): row for row in rows if row["step"] == step}
    return f"step {step:,}: {', '.join(_words(found[key]) for key in sorted(found))}"


def _words(row: Mapping[str, Any]) -> str:
    at = f" at {row['length']:,}" if row["length"] else ""
    return f"{row['task']}{at} " + (f"{row['mean']:.3f}" if row["measures"] == "loss" else f"{row['mean']:.0%}")
