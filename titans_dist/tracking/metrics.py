"""metrics.jsonl: one JSON object per line, appended, complete up to the last line whatever kills the process.

Every row has `kind` ("train", "memory", "event" or "evaluation"), `step` and `time` (Unix seconds). A "train" row has
the fields of StepRow; an "event" row has `name`; a "memory" row has `layers`: for each neural memory what
`titans_dist.layers.telemetry` says of it, on rank 0's first micro-batch of the step and its share of the heads. JSON
knows no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf", and read back as floats. A
restarted run appends, so a step may come twice; the later row counts.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class StepRow:
    """What the training loop knows after one optimizer step."""

    step: int
    """Steps done so far, this one included: the first is 1."""
    loss: float
    """Mean cross-entropy per token, in nats, over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of this step."""
    tokens: int
    """Tokens seen since step 1, over all processes and restarts."""
    tokens_per_s: float
    """Tokens of this step over all processes, per second."""
    step_time_s: float
    """Seconds this step took, waiting for data included."""
    data_wait: float
    """Share of the step spent waiting for data, 0 to 1."""
    memory_bytes: int
    """Peak memory of this process: on the device, or resident on the host where there is none."""


class MetricsFile:
    """Appends rows to metrics.jsonl. Raises OSError where it cannot; the next row then starts on a new line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._torn = False

    def append(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        """Write one row and hand it to the operating system before returning."""
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **fields}
        line = json.dumps({key: _to_json(value) for key, value in row.items()}, default=str) + "\n"
        if self._file is None:
            self._file = self._open()
        data = (b"\n" if self._torn else b"") + line.encode()
        self._torn = True  # until all of it is written
        if self._file.write(data) != len(data):
            raise OSError(f"{self.path} took only a part of a line; the disk may be full")
        self._torn = False

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that a SIGKILL between two rows loses nothing.
        file = self.path.open("a+b", buffering=0)
        if file.tell() > 0:
            file.seek(-1, 2)
            self._torn = file.read(1) != b"\n"
        return file


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order they were written; lines torn by a kill are skipped."""
    return parse(Path(path).read_bytes())


def parse(text: bytes) -> list[dict[str, Any]]:
    """The rows of such a text."""
    rows = []
    for line in text.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # torn, or an empty line
            continue
        if isinstance(row, dict) and "kind" in row:
            rows.append({key: _from_json(value) for key, value in row.items()})
    return rows


def losses(path: Path | str) -> dict[int, float]:
    """Training loss by step; where a restarted run did a step again, the later loss counts."""
    return {row["step"]: row["loss"] for row in read_metrics(path) if row["kind"] == "train"}


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
