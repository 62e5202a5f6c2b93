"""What was measured, for ever: checkpoint x piece of work -> result. A row is written once and never changed.

One SQLite file in each run folder, written by the driver alone. A piece that is there already is not measured again,
which makes an evaluation that was killed go on where it was.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_dist.config import UserError
from titans_dist.evaluation.work import Piece, Result

FILE = "evaluation.sqlite"
"""In the folder `reports` of a run."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    checkpoint TEXT NOT NULL, step INTEGER NOT NULL, trained_tokens INTEGER NOT NULL, model TEXT NOT NULL,
    piece TEXT NOT NULL, task TEXT NOT NULL, length INTEGER NOT NULL, seed INTEGER NOT NULL,
    first INTEGER NOT NULL, count INTEGER NOT NULL, samples TEXT NOT NULL,
    scores TEXT NOT NULL, detail TEXT NOT NULL,
    tokens INTEGER NOT NULL, seconds REAL NOT NULL, peak_bytes INTEGER NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (checkpoint, piece)
) STRICT;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON results BEGIN SELECT RAISE(ABORT, 'results are final'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON results BEGIN SELECT RAISE(ABORT, 'results are final'); END;
"""


@dataclass(frozen=True)
class Measured:
    """The checkpoint that was measured."""

    checkpoint: str
    """The digest of its manifest."""
    step: int
    trained_tokens: int
    """Tokens it had been trained on."""
    model: str
    """Which variant and memory, such as mag titans."""


@dataclass(frozen=True)
class Row:
    """One line of the ledger."""

    measured: Measured
    piece: Piece
    result: Result
    time: float
    """Unix seconds."""


class Ledger:
    """The results of one run."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where the file is no ledger."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as connection:
                connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is no ledger of results ({error}); move it away to begin a new one") from None

    def done(self, checkpoint: str) -> set[str]:
        """Keys of the pieces that are measured of a checkpoint."""
        with self._open() as connection:
            return {
                key for (key,) in connection.execute("SELECT piece FROM results WHERE checkpoint = ?", (checkpoint,))
            }

    def add(self, measured: Measured, piece: Piece, result: Result) -> bool:
        """Write a result down; False where the piece is there already, which then stays as it is."""
        row = (
            *(measured.checkpoint, measured.step, measured.trained_tokens, measured.model),
            *(piece.key, piece.task, piece.length, piece.seed, piece.first, piece.count),
            *(result.samples, json.dumps(result.scores), json.dumps(result.detail)),
            *(result.tokens, result.seconds, result.peak_bytes, time.time()),
        )
        with self._open() as connection:
            places = ",".join("?" * len(row))
            return connection.execute(f"INSERT OR IGNORE INTO results VALUES ({places})", row).rowcount == 1

    def rows(self, steps: Iterable[int] | None = None) -> list[Row]:
        """All results, or those of the checkpoints of some steps, in the order in which they were written."""
        wanted = None if steps is None else set(steps)
        with self._open() as connection:
            found = connection.execute("SELECT * FROM results ORDER BY time, piece")
            return [_row(values) for values in found if wanted is None or values[1] in wanted]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            with connection:
                yield connection
        finally:
            connection.close()


def _row(values: tuple[Any, ...]) -> Row:
    checkpoint, step, trained, model, _, task, length, seed, first, count, samples, scores, detail, *rest = values
    tokens, seconds, peak_bytes, when = rest
    return Row(
        Measured(checkpoint, step, trained, model),
        Piece(task, length, seed, first, count),
        Result(json.loads(scores), samples, tokens, seconds, peak_bytes, json.loads(detail)),
        when,
    )
