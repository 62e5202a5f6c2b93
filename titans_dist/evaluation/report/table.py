"""Every number of the report as a file of comma-separated values, one to a line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titans_dist.evaluation.ledger import Measured
from titans_dist.evaluation.measure import POSITIONS
from titans_dist.evaluation.report import published
from titans_dist.evaluation.report.runs import Results, by_depth, by_position, depth_bins
from titans_dist.evaluation.summary import Line, bits_per_byte, bytes_per_token, lines

COLUMNS = (
    *("source", "run", "model", "step", "trained_tokens", "checkpoint", "task", "length", "part", "metric", "value"),
    *("low", "high", "count", "seeds", "samples", "tokens", "seconds", "peak_bytes", "comparable"),
)
WHOLE = "whole"


def write(runs: Sequence[Results], path: Path) -> None:
    """Write all scores of all checkpoints, their parts by depth and by position, and the papers' rows.

    Shares are 0 to 1, losses nats per token. `source` says whose a number is: measured, or else the paper.
    `comparable` says of other runs whether their samples are those of the report's own run.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for run in runs:
            for task in run.tasks:
                for measured, rows in run.checkpoints(task).items():
                    head = _head(run, measured, task)
                    for line in lines(rows):
                        writer.writerow(head | _score(line) | {"comparable": comparable(runs[0], line, run)})
                        if line.bytes_per_token:
                            bits = bits_per_byte(line.mean, line.bytes_per_token)
                            place = {"length": line.length, "part": WHOLE, "metric": "bits per byte", "value": bits}
                            writer.writerow(head | place)
                    for part in _parts(rows, depth_bins(runs, task)):
                        writer.writerow(head | part)
        writer.writerows(_theirs(runs))


def comparable(own: Results, line: Line, run: Results) -> str:
    """yes, no, or nothing where there is nothing to compare with."""
    mine = own.lines(line.task).get(line.length)
    if mine is None or run is own:
        return ""
    return "yes" if mine.samples == line.samples else "no"


def _head(run: Results, measured: Measured, task: str) -> dict[str, Any]:
    return {
        "source": "measured",
        "run": run.name,
        "model": measured.model,
        "step": measured.step,
        "trained_tokens": measured.trained_tokens,
        "checkpoint": measured.checkpoint,
        "task": task,
    }


def _score(line: Line) -> dict[str, Any]:
    return {
        "length": line.length,
        "part": WHOLE,
        "metric": "loss" if line.is_loss else "accuracy",
        "value": line.mean,
        "low": line.low,
        "high": line.high,
        "count": line.count,
        "seeds": " ".join(map(str, line.seeds)),
        "samples": line.samples,
        "tokens": line.tokens,
        "seconds": line.seconds,
        "peak_bytes": line.peak_bytes,
    }


def _parts(rows: Sequence[Any], bins: int) -> Iterator[dict[str, Any]]:
    for depth in by_depth(rows, bins):
        part = f"depth {depth.begin:.0%} to {depth.end:.0%}"
        yield {
            "length": depth.length,
            "part": part,
            "metric": "accuracy",
            "value": depth.mean,
            "count": depth.count,
        }
    for length in sorted({row.piece.length for row in rows if row.piece.task == POSITIONS}):
        for begin, loss in by_position(rows, length).items():
            place = {"length": length, "part": f"position {begin}"}
            yield {**place, "metric": "loss", "value": loss}
            if per_token := bytes_per_token(rows):
                yield {**place, "metric": "bits per byte", "value": bits_per_byte(loss, per_token)}


def _theirs(runs: Sequence[Results]) -> Iterator[dict[str, Any]]:
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        lengths = sorted({length for run in runs for length in run.lines(task)})
        for row in published.accuracy(task, lengths):
            for length, share in row.accuracy.items():
                yield {
                    "source": str(row.source),
                    "model": row.model,
                    "task": task,
                    "length": length,
                    "part": WHOLE,
                    "metric": "accuracy",
                    "value": share,
                }
